"""From the data set to batches of views: which images when (`plan`), their pixels (`decode`), through Ray Data
(`reader`)."""
