"""What two experiments share: data, training loop, run directories, metrics, plots, speed."""
