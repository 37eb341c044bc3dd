"""A recipe carried out: requests in order, their folder, measuring, export."""
