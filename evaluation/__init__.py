"""What the scores and the trained policies say: accuracy, comparison, doctor, report."""
