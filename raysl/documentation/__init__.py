"""What there is, shown: tables, pictures of views, and pages of documentation."""
