"""What is not generation: matching, embedding, scoring of given texts."""
