"""OneCAT, whose weights are public: it draws bit by bit at 512 and 1024 pixels, edits, and answers about images."""
