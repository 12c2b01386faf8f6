"""What the mesh costs and how fast it is: `./dev bench`. One module a figure."""
