"""Pipeline schedules as data: tables, a checker, and an executor for plain ``nn.Module`` stages.

``actions`` (a table and its notation), ``schedules`` (generators), ``checker``, ``executor``, ``plain`` (an adapter for
modules that know nothing of r1mega), ``partition`` (cutting a model), ``weight_gradient`` (the store of split
backwards), ``transfers``, ``packing`` and ``transport`` (messages).
"""
