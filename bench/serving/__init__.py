"""tta's server beside the servers people use: same model file, same machine, same load, one run."""
