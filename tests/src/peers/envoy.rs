//! Envoy, with any configuration.

use std::fs;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::Package;
use crate::eventually::{TIMEOUT, eventually_ok};
use crate::place::Place;
use crate::process::Process;

/// A running Envoy. Dropping it kills it.
#[derive(Debug)]
pub struct Envoy {
    process: Process,
    place: Place,
}

impl Envoy {
    /// Starts it with a static configuration, to which its admin port is added, and waits until it is ready.
    ///
    /// It has the group `group`, and ends with the thread that calls this.
    ///
    /// # Errors
    /// If it is not unpacked, or refuses the configuration: the error has its output.
    pub fn start(place: &Place, mut config: Value, group: u32) -> Result<Self> {
        config["admin"] = json!({
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN}},
        });
        let path = place.folder().join("envoy.json");
        fs::write(&path, config.to_string())
            .with_context(|| format!("writing {}", path.display()))?;
        let mut command = place.command("setpriv")?;
        command
            .args(["--regid", &group.to_string(), "--clear-groups"])
            .arg(Package::ENVOY.folder()?.join(Package::ENVOY.file))
            .arg("--config-path")
            .arg(&path)
            // Istio's own default, on every machine.
            .args(["--concurrency", "2", "--disable-hot-restart"])
            .args(["--log-level", "error"])
            // Of access logs.
            .args(["--file-flush-interval-msec", "50"]);
        let mut envoy = Self {
            process: Process::spawn(command)?,
            place: place.clone(),
        };
        envoy
            .wait_ready()
            .with_context(|| format!("Envoy in {} said: {}", place.name(), envoy.output()))?;
        Ok(envoy)
    }

    /// Its process ID.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Its output, which is empty if there are no errors.
    pub fn output(&self) -> String {
        self.process.stderr()
    }

    /// Requests a page of its admin port.
    pub fn ask(&self, path: &str) -> Result<String> {
        super::ask(&self.place, ADMIN, path)
    }

    fn wait_ready(&mut self) -> Result<()> {
        eventually_ok(TIMEOUT, "Envoy to be ready", || {
            if let Some(status) = self.process.ended()? {
                return Ok(Err(anyhow!("it ended with {status}")));
            }
            self.ask("/ready").map(|_| Ok(()))
        })?
    }
}

/// Its admin port, in the place's namespace.
const ADMIN: u16 = 15000;
