//! `openssl s_server`: an application that uses TLS itself.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::place::Place;
use crate::process::Process;

/// A TLS server with a self-signed certificate for `localhost`. It answers HTTP requests with its own status page.
#[derive(Debug)]
pub struct OpensslServer {
    process: Process,
    certificate: PathBuf,
}

impl OpensslServer {
    /// Starts it with more arguments of `s_server`, `["-www"]` if there are none, and waits until it listens.
    pub fn start(place: &Place, port: u16, arguments: &[&str]) -> Result<Self> {
        let key = place.folder().join(format!("openssl-{port}.key"));
        let certificate = place.folder().join(format!("openssl-{port}.pem"));
        let (key_text, certificate_text) =
            (key.display().to_string(), certificate.display().to_string());
        place
            .run(
                "openssl",
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=localhost -keyout"
                    .split(' ')
                    .chain([key_text.as_str(), "-out", &certificate_text]),
            )?
            .ok()
            .context("making a certificate for s_server")?;
        let port_text = port.to_string();
        let base = [
            "s_server",
            "-accept",
            &port_text,
            "-key",
            &key_text,
            "-cert",
            &certificate_text,
        ];
        let arguments = if arguments.is_empty() {
            &["-www"]
        } else {
            arguments
        };
        let process = place.spawn("openssl", base.iter().chain(arguments))?;
        place
            .wait_listening(port)
            .with_context(|| format!("s_server said: {}", process.stderr()))?;
        Ok(Self {
            process,
            certificate,
        })
    }

    /// Its certificate, for clients to trust.
    pub fn certificate(&self) -> &Path {
        &self.certificate
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}
