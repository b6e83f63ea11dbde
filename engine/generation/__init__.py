"""Text from a decoder: requests, batching, stopping, scores, chat."""
