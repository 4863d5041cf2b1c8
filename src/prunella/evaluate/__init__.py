"""How good a model is: perplexities and their intervals, accuracies on tasks, what a run measures of itself."""
