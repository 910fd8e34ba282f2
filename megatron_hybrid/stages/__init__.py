"""Training in stages: from pretraining to the released model, with averages in between."""
