"""What the commands of `dsla` do, one module a command. Their options are in `dsla_cli`."""
