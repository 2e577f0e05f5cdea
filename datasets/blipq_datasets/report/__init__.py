"""A contact sheet of a run: some of its rows with their pictures and answers, as one HTML file."""
