"""Features that never fire on the corpus: probe sentences made from what they promote, and labels for those that wake up."""
