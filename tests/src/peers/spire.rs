//! SPIRE's server: the authority of another trust domain, which serves and fetches bundles.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use crate::eventually::{TIMEOUT, eventually_ok};
use crate::kubernetes::{first_missing, program};
use crate::place::Place;
use crate::process::{Finished, Process};

/// How a server differs from one that has only defaults.
#[derive(Debug, Clone, Default)]
pub struct SpireOptions {
    /// Files with the certificate and the key of a CA that signs SPIRE's, instead of a root of its own. Both in PEM.
    pub upstream: Option<[PathBuf; 2]>,
    /// Files with the certificate and the key of its endpoint, which then has the profile `https_web`. Both in PEM.
    pub web: Option<[PathBuf; 2]>,
    /// A file with the roots that verify other endpoints of that profile, instead of the system's.
    pub web_roots: Option<PathBuf>,
}

/// A running server of the trust domain [`Spire::TRUST_DOMAIN`] whose bundle endpoint has the default port. Dropping it kills
/// it.
#[derive(Debug)]
pub struct Spire {
    process: Process,
    place: Place,
    folder: PathBuf,
}

impl Spire {
    /// Its trust domain.
    pub const TRUST_DOMAIN: &str = "spire.example";
    /// The port of its bundle endpoint.
    pub const PORT: u16 = 8443;
    /// The SPIFFE ID of its bundle endpoint.
    pub const ENDPOINT: &str = "spiffe://spire.example/spire/server";

    /// Why none can run here: the program that is missing.
    pub fn missing() -> Option<String> {
        first_missing(&[SERVER], &[])
    }

    /// Starts it with a configuration of which `federation` is the section of that name, and waits until it is ready.
    ///
    /// # Errors
    /// If it ends, or is not ready in time: the error has its log.
    pub fn start(place: &Place, federation: &str, options: &SpireOptions) -> Result<Self> {
        let folder = place.folder().join("spire");
        fs::create_dir_all(folder.join("data")).context("making the folder of SPIRE")?;
        let config = folder.join("server.conf");
        let text = server_conf(&folder, federation, options)?;
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(folder.join(LOG))
            .context("opening SPIRE's log")?;
        let mut command = place.command(program(SERVER))?;
        command
            .args(["run", "-config"])
            .arg(&config)
            .current_dir(&folder)
            .stdout(log.try_clone().context("sharing SPIRE's log")?)
            .stderr(log);
        if let Some(roots) = &options.web_roots {
            command.env("SSL_CERT_FILE", roots);
        }
        let mut spire = Self {
            process: Process::spawn_as_is(command)?,
            place: place.clone(),
            folder,
        };
        spire.write_client()?;
        let ready = spire.wait_ready();
        ready.with_context(|| format!("SPIRE said: {}", spire.output()))?;
        Ok(spire)
    }

    /// A client that its operator can call without naming the socket.
    fn write_client(&self) -> Result<()> {
        let client = self.folder.join(SERVER);
        let (server, socket) = (program(SERVER), self.folder.join(SOCKET));
        let script = format!(
            "#!/bin/sh\nexec '{}' \"$@\" -socketPath '{}'\n",
            server.display(),
            socket.display()
        );
        fs::write(&client, script)
            .and_then(|()| fs::set_permissions(&client, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("writing {}", client.display()))
    }

    fn wait_ready(&mut self) -> Result<()> {
        eventually_ok(TIMEOUT, "SPIRE to be ready", || {
            if let Some(status) = self.process.ended()? {
                return Ok(Err(anyhow!("it ended with {status}")));
            }
            ensure!(self.folder.join(SOCKET).exists(), "no socket yet");
            self.run(&["bundle", "show"])?;
            Ok(Ok(()))
        })??;
        self.place.wait_listening(Self::PORT)
    }

    /// Runs `spire-server` with these arguments, as its operator would. Returns its output.
    ///
    /// # Errors
    /// If it fails.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.place.command(self.folder.join(SERVER))?;
        command.args(arguments);
        Ok(Process::spawn(command)?.finish(TIMEOUT)?.ok()?.stdout)
    }

    /// Runs commands of its operator by a shell, in [`Spire::folder`]. Stops at the first that fails.
    pub fn shell(&self, script: &str) -> Result<Finished> {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut shell = self.place.command("sh")?;
        shell
            .args(["-ec", script])
            .current_dir(&self.folder)
            .env("PATH", format!("{}:{path}", self.folder.display()));
        Process::spawn(shell)?.finish(TIMEOUT)
    }

    /// Issues an X.509-SVID. Returns the files with its chain and its key, both in PEM.
    ///
    /// # Errors
    /// If SPIRE refuses.
    pub fn mint(&self, id: &str) -> Result<[PathBuf; 2]> {
        let folder = self.folder.join("svid");
        fs::create_dir_all(&folder).context("making a folder for an SVID")?;
        let to = folder.display().to_string();
        self.run(&["x509", "mint", "-spiffeID", id, "-write", &to])?;
        Ok(["svid.pem", "key.pem"].map(|name| folder.join(name)))
    }

    /// Its own bundle, as a SPIFFE bundle document.
    pub fn bundle(&self) -> Result<Value> {
        let document = self.run(&["bundle", "show", "-format", "spiffe"])?;
        serde_json::from_str(&document).with_context(|| format!("reading {document}"))
    }

    /// What it knows of the bundle of a trust domain: roots in PEM.
    ///
    /// # Errors
    /// If it knows none.
    pub fn bundle_of(&self, trust_domain: &str) -> Result<String> {
        self.run(&["bundle", "list", "-id", trust_domain])
    }

    /// The folder where its operator works.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its log.
    pub fn output(&self) -> String {
        fs::read_to_string(self.folder.join(LOG)).unwrap_or_default()
    }
}

fn server_conf(folder: &Path, federation: &str, options: &SpireOptions) -> Result<String> {
    let federation = match &options.web {
        None => federation.to_owned(),
        Some([certificate, key]) => {
            let spiffe = "profile \"https_spiffe\" {}";
            ensure!(federation.contains(spiffe), "no {spiffe} in {federation}");
            let web = format!(
                "profile \"https_web\" {{\n serving_cert_file {{\n cert_file_path = {certificate:?}\n \
                 key_file_path = {key:?}\n file_sync_interval = \"1h\"\n }}\n }}"
            );
            federation.replace(spiffe, &web)
        }
    };
    let upstream = options
        .upstream
        .as_ref()
        .map_or_else(String::new, |[certificate, key]| {
            format!(
                "UpstreamAuthority \"disk\" {{\n plugin_data {{\n cert_file_path = {certificate:?}\n \
                 key_file_path = {key:?}\n }}\n }}"
            )
        });
    let (socket, data) = (folder.join(SOCKET), folder.join("data"));
    let database = data.join("datastore.sqlite3");
    Ok(format!(
        r#"server {{
    bind_address = "127.0.0.1"
    bind_port = "8081"
    socket_path = {socket:?}
    trust_domain = "{}"
    data_dir = {data:?}
    log_level = "DEBUG"
    {federation}
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{
            database_type = "sqlite3"
            connection_string = {database:?}
        }}
    }}
    KeyManager "memory" {{
        plugin_data {{}}
    }}
    NodeAttestor "join_token" {{
        plugin_data {{}}
    }}
    {upstream}
}}
"#,
        Spire::TRUST_DOMAIN
    ))
}

const SERVER: &str = "spire-server";
const SOCKET: &str = "api.sock";
const LOG: &str = "log";
