"""Questions to the search and what is said of its plans: reasons, remedies, fronts, the document."""
