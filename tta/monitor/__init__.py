"""Is the traffic still what the model knows? Pure numpy: no sockets, no files, no clocks."""
