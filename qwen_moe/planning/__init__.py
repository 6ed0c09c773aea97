"""From a recipe, a GPU and a number of them to the layouts that fit, what they hold and how long a step takes."""
