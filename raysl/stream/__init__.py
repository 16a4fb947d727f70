"""Turn a data set into batches of views: choose the images of each step (`plan`), decode and crop them (`decode`), and
stream the batches to the training workers (`reader`), through Ray Data (`data_tasks`) or without Ray (`processes`)."""
