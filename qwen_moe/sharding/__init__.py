"""How parameters are split over ranks, and a rank's part of the model. Only this folder knows both models and ranks."""
