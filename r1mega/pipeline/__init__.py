"""Pipeline schedules as data: tables, a checker, and an executor for plain ``nn.Module`` stages."""
