"""Small tasks with verifiable answers, made by a program: what the examples and the tests learn."""
