"""How often each test of groups says that there is a difference: where there is none, and where there is one."""
