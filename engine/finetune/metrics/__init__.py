"""Measures of predictions, as pure functions of labels, spans, texts and ranks; their definitions are in each module."""
