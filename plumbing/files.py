from plumbing.checkpoint import atomically, check_folder, write_atomically  # noqa
