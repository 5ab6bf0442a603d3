"""Pipeline schedules as data. Nothing here knows r1mega's model: stages are any ``nn.Module``.

A table: ``actions`` (tables and their notation), ``table_file`` (reading one), ``schedules`` (generators), ``auto``
(search), ``checker``, ``transfers`` (the messages that follow from a table). Time: ``costs``, ``simulator``,
``timeline`` (pictures, traces). Running it: ``executor``, ``exchange`` (stages that pause where they communicate),
``weight_gradient`` (split backwards), ``plain`` (an adapter for plain modules), ``transport`` and ``packing``
(messages). A model: ``partition`` (cutting it).
"""
