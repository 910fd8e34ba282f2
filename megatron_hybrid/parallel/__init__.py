"""Where the model runs. Importing it changes nothing in the process."""
