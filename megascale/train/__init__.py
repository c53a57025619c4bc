"""The training loop; knows no model and no dataset."""
