"""What the tests stand on: real programs around arcbridge, and ways to start and watch them."""
