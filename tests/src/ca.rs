//! The CA of a mesh, as a process on the host outside of the mesh.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::{Map, Value, json};

use crate::eventually::{TIMEOUT, eventually_ok};
use crate::locate::auth_daemon;
use crate::mesh::Mesh;
use crate::oidc::OidcIssuer;
use crate::place::Place;
use crate::process::{Finished, Process, json_lines};

/// Options of a CA. An option that is not set has the CA's own default, except for its address and its callers: by
/// default each node of the mesh may call it with a token of its own.
#[derive(Debug, Clone, Default)]
pub struct CaOptions {
    settings: Map<String, Value>,
    people: Option<(Value, Value)>,
}

impl CaOptions {
    /// Sets any top-level setting; overrides all others.
    pub fn setting(mut self, name: &str, value: Value) -> Self {
        self.settings.insert(name.to_owned(), value);
        self
    }

    /// Accepts tokens of people that `issuer` signs for the audience `mesh`. `accounts` says who may act as which account, as
    /// in the CA's configuration; names are their e-mail addresses.
    pub fn people(mut self, issuer: &OidcIssuer, accounts: Value) -> Self {
        let people = json!({
            "issuer": issuer.name, "audience": "mesh", "nameClaim": "email", "accounts": accounts,
        });
        self.people = Some((people, issuer.keys()));
        self
    }
}

/// A running CA on the host outside of the mesh. Dropping it kills it with SIGKILL; its state is kept until the mesh is
/// removed.
#[derive(Debug)]
pub struct Ca {
    place: Place,
    folder: PathBuf,
    address: String,
    process: Process,
}

/// What a node needs to call a CA: see [`crate::DaemonOptions::ca`].
#[derive(Debug, Clone)]
pub(crate) struct CaAccess {
    pub(crate) address: String,
    folder: PathBuf,
}

impl CaAccess {
    /// The `ca` section of the configuration of a node's daemon.
    pub(crate) fn section(&self, node: &str) -> Value {
        json!({
            "address": self.address,
            "rootFile": self.folder.join(STATE).join(ROOTS),
            "tokenFile": self.folder.join(TOKENS).join(node),
        })
    }
}

impl Ca {
    pub(crate) fn spawn(mesh: &Mesh, options: &CaOptions) -> Result<Self> {
        let place = mesh.outside().clone();
        let folder = place.folder().join("ca");
        let tokens = folder.join(TOKENS);
        fs::create_dir_all(&tokens).with_context(|| format!("making {}", tokens.display()))?;
        let mut nodes = Vec::new();
        for node in mesh.nodes() {
            let file = tokens.join(node.name());
            if !file.exists() {
                let token = format!("{}-{}", node.name(), random()?);
                fs::write(&file, token).with_context(|| format!("writing {}", file.display()))?;
            }
            nodes.push(json!({"node": node.name(), "tokenFile": file}));
        }
        let address = format!("{}:15012", mesh.outside_ipv4());
        let mut config = json!({
            "listen": address,
            "serverNames": [mesh.outside_ipv4().to_string()],
            "readiness": format!("{}:15013", mesh.outside_ipv4()),
            "operatorSocket": folder.join(OPERATOR),
            "directory": folder.join(STATE),
            "attestation": {"tokens": nodes},
            "discovery": {"files": mesh.manifests().folder()},
            "log": {"format": "json"},
        });
        for (name, value) in &options.settings {
            config[name] = value.clone();
        }
        if let Some((people, keys)) = &options.people {
            let file = folder.join(KEYS_OF_PEOPLE);
            fs::write(&file, keys.to_string())
                .with_context(|| format!("writing {}", file.display()))?;
            config["attestation"]["people"] = people.clone();
            config["attestation"]["people"]["jwksFile"] = json!(file);
        }
        let path = folder.join(CONFIG);
        fs::write(&path, format!("{config:#}\n"))
            .with_context(|| format!("writing {}", path.display()))?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(folder.join(LOG))
            .context("opening the CA's log")?;
        let mut command = place.command(auth_daemon()?)?;
        command.args(["ca", "--config"]).arg(&path);
        command
            .stdout(log.try_clone().context("sharing the CA's log")?)
            .stderr(log);
        let mut ca = Self {
            process: Process::spawn_as_is(command).context("the CA")?,
            place,
            folder,
            address,
        };
        ca.wait_ready()?;
        Ok(ca)
    }

    /// Waits until the CA accepts connections, its operator's too. Fails at once if its process exits instead.
    fn wait_ready(&mut self) -> Result<()> {
        let port = 15012;
        let ready = eventually_ok(TIMEOUT, "the CA to be ready", || {
            if let Some(status) = self.process.ended()? {
                return Ok(Err(status));
            }
            let listens = self
                .place
                .endpoints()?
                .iter()
                .any(|socket| socket.remote.port() == 0 && socket.local.port() == port);
            anyhow::ensure!(listens && self.roots().exists(), "nothing listens yet");
            // The socket of a CA before this one may still be there.
            UnixStream::connect(self.folder.join(OPERATOR))
                .with_context(|| format!("connecting to {OPERATOR}"))?;
            Ok(Ok(()))
        });
        match ready.with_context(|| format!("its log: {}", self.log_text()))? {
            Ok(()) => Ok(()),
            Err(status) => bail!("the CA ended with {status}: {}", self.log_text()),
        }
    }

    /// Runs `auth-daemon ca …` against this CA, as its operator would.
    pub fn operate(&self, arguments: &[&str]) -> Result<Finished> {
        let mut command = self.place.command(auth_daemon()?)?;
        command
            .arg("ca")
            .args(arguments)
            .arg("--config")
            .arg(self.folder.join(CONFIG));
        Process::spawn(command)?.finish(TIMEOUT)
    }

    /// Runs `auth-daemon connect` for a person with `token` on the host outside of the mesh, without any capability.
    /// `arguments` follow the options that name the CA and the mesh's manifests.
    pub fn connect(&self, mesh: &Mesh, token: &str, arguments: &[&str]) -> Result<Process> {
        let file = self.folder.join(PERSON);
        fs::write(&file, token).with_context(|| format!("writing {}", file.display()))?;
        let mut command = self.place.command("setpriv")?;
        command
            .args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"])
            .arg(auth_daemon()?)
            .args(["connect", "--ca", &self.address, "--root-file"])
            .arg(self.roots())
            .arg("--token-file")
            .arg(file)
            .arg("--files")
            .arg(mesh.manifests().folder())
            .args(arguments);
        Process::spawn(command)
    }

    /// The output of `auth-daemon ca status --json`.
    pub fn status(&self) -> Result<Value> {
        let answer = self.operate(&["status", "--json"])?.ok()?.stdout;
        serde_json::from_str(&answer).with_context(|| format!("reading the status {answer}"))
    }

    /// The file with its roots in PEM, as given to clients that verify certificates.
    pub fn roots(&self) -> PathBuf {
        self.state().join(ROOTS)
    }

    /// The folder with its state.
    pub fn state(&self) -> PathBuf {
        self.folder.join(STATE)
    }

    /// The file with a node's token.
    pub fn token(&self, node: &str) -> PathBuf {
        self.folder.join(TOKENS).join(node)
    }

    /// Its address, as host and port.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn access(&self) -> CaAccess {
        CaAccess {
            address: self.address.clone(),
            folder: self.folder.clone(),
        }
    }

    /// Its process, to send it signals or wait until it exits.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Everything that this CA and its predecessors in this mesh have logged.
    pub fn log_text(&self) -> String {
        fs::read_to_string(self.folder.join(LOG)).unwrap_or_default()
    }

    /// Its log lines so far, one JSON object each.
    pub fn logs(&self) -> Vec<Value> {
        json_lines(&self.log_text())
    }

    /// Kills it with SIGKILL, as a crash would.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// Sends SIGTERM and waits until it has exited.
    pub fn terminate(mut self, deadline: Duration) -> Result<ExitStatus> {
        self.process.signal(Signal::SIGTERM)?;
        let ended = self.process.wait(deadline);
        ended.with_context(|| format!("its log: {}", self.log_text()))
    }
}

fn random() -> Result<String> {
    let mut bytes = [0; 24];
    let mut source = fs::File::open(Path::new("/dev/urandom")).context("opening /dev/urandom")?;
    std::io::Read::read_exact(&mut source, &mut bytes).context("reading /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

const OPERATOR: &str = "operator/operator.sock";
const KEYS_OF_PEOPLE: &str = "people.jwks";
const PERSON: &str = "person.token";
const STATE: &str = "state";
const ROOTS: &str = "root-cert.pem";
const TOKENS: &str = "tokens";
const CONFIG: &str = "config.json";
const LOG: &str = "log";
