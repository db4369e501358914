"""What every room needs: arrays, errors, types, registries, files, seeds, the request to stop."""
