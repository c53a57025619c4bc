"""What differs between jobs that train: data, loss, first weights."""
