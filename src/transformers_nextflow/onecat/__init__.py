"""OneCAT, whose weights are public: it draws at 512 and 1024 pixels by bits, edits, reads images and answers."""
