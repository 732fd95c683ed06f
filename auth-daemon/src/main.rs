//! The `auth-daemon` binary.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match auth_daemon::cli::Cli::parse().execute() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("auth-daemon: {error:#}");
            ExitCode::FAILURE
        }
    }
}
