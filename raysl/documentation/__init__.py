"""Show the methods: tables, pictures of views, and pages of documentation."""
