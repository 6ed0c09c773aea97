"""The one folder that knows models and ranks: how parameters are split, and a rank's part of the model."""
