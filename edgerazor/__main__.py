from edgerazor.cli import main

main()
