"""The hot process: admits requests, batches them, runs the model, swaps versions between batches."""
