//! Parses the command line and dispatches; everything else is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tessera::cli::main()
}
