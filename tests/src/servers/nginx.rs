//! nginx with a configuration of its own.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::eventually::eventually;
use crate::place::Place;
use crate::process::{Process, json_lines};

/// nginx that answers every request with one body, on IPv4 and IPv6.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    prefix: PathBuf,
    place: Place,
    port: u16,
}

impl Drop for Nginx {
    /// Waits until it no longer listens: its workers may outlive the first process for a moment.
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.place.wait_listeners(self.port, |count| count == 0);
    }
}

/// A request as nginx logged it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct NginxRequest {
    /// `$remote_addr`: the client's address.
    pub remote_address: IpAddr,
    /// `$remote_port`.
    pub remote_port: u16,
    /// `$server_addr`: the address that the client was accepted on.
    pub server_address: IpAddr,
    /// `$server_port`.
    pub server_port: u16,
    /// `$connection`: the number of the connection.
    pub connection: u64,
    /// `$request_uri`: path and arguments.
    pub path: String,
    /// `$status` of the answer.
    pub status: u16,
}

impl Nginx {
    /// Starts it and waits until it listens. Several may run in a place, on different ports.
    ///
    /// # Panics
    /// When the body holds a character that nginx's configuration would take for its own: `"`, `$` or `\`.
    pub fn start(place: &Place, port: u16, body: &str) -> Result<Self> {
        Self::start_with(place, port, body, "access.log fields")
    }

    /// Like [`Nginx::start`], but it logs no requests: to be measured.
    ///
    /// # Panics
    /// Likewise.
    pub fn start_without_log(place: &Place, port: u16, body: &str) -> Result<Self> {
        Self::start_with(place, port, body, "off")
    }

    fn start_with(place: &Place, port: u16, body: &str, access_log: &str) -> Result<Self> {
        assert!(
            !body.contains(['"', '$', '\\']),
            "the body is written into nginx's configuration as it is"
        );
        let prefix = place.folder().join(format!("nginx-{port}"));
        fs::create_dir_all(prefix.join("temp"))
            .with_context(|| format!("making {}", prefix.display()))?;
        let config = CONFIG
            .replace("PORT", &port.to_string())
            .replace("ACCESS_LOG", access_log)
            .replace("BODY", body);
        fs::write(prefix.join("nginx.conf"), config).context("writing nginx's configuration")?;
        let prefix_text = prefix.display().to_string();
        let process = place.spawn(
            "nginx",
            ["-p", &prefix_text, "-c", "nginx.conf", "-e", "stderr"],
        )?;
        // One for each address family.
        place
            .wait_listeners(port, |count| count == 2)
            .with_context(|| format!("nginx said: {}", process.stderr()))?;
        Ok(Self {
            process,
            prefix,
            place: place.clone(),
            port,
        })
    }

    /// The requests logged so far.
    pub fn requests(&self) -> Vec<NginxRequest> {
        let log = fs::read_to_string(self.prefix.join("access.log")).unwrap_or_default();
        json_lines(&log)
            .into_iter()
            .filter_map(|line| serde_json::from_value(line).ok())
            .collect()
    }

    /// Waits for a request to this path; nginx logs it after it has answered.
    pub fn wait_for_request(&self, path: &str, deadline: Duration) -> Result<NginxRequest> {
        eventually(
            deadline,
            &format!("nginx to log a request to {path}"),
            || {
                self.requests()
                    .into_iter()
                    .find(|request| request.path == path)
            },
        )
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

const CONFIG: &str = r#"
daemon off;
worker_processes 1;
user root;
error_log stderr warn;
pid nginx.pid;
events { worker_connections 8192; }
http {
    log_format fields escape=json '{"remote_address":"$remote_addr","remote_port":$remote_port,'
        '"server_address":"$server_addr","server_port":$server_port,"connection":$connection,'
        '"path":"$request_uri","status":$status}';
    access_log ACCESS_LOG;
    client_body_temp_path temp/body;
    proxy_temp_path temp/proxy;
    fastcgi_temp_path temp/fastcgi;
    uwsgi_temp_path temp/uwsgi;
    scgi_temp_path temp/scgi;
    keepalive_requests 10000000;
    default_type text/plain;
    server {
        listen PORT backlog=4096;
        listen [::]:PORT ipv6only=on backlog=4096;
        location / { return 200 "BODY"; }
    }
}
"#;
