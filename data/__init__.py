"""One folder per dataset: how to get it, and the builder that prepares it."""
