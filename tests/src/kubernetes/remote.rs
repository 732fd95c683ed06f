//! What a cluster gives to another one that reads it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;

use super::{Kubernetes, START, TokenOptions};
use crate::process::Process;

const PAGE: &str = include_str!("../../../docs/MULTICLUSTER.md");
/// The name of this cluster on the page.
const ON_PAGE: &str = "east";

impl Kubernetes {
    /// Runs the commands of `docs/MULTICLUSTER.md` that let another cluster read this one. Returns the file of the remote
    /// secret that they write, for the other cluster to apply: this one's name there is `cluster`.
    pub fn remote_secret(&self, cluster: &str) -> Result<PathBuf> {
        let blocks = PAGE.split("```sh\n").skip(1);
        let mut blocks = blocks.filter_map(|rest| Some(rest.split_once("```")?.0));
        let (account, secret) = blocks.next().zip(blocks.next()).context("no commands")?;
        self.shell(account)?;
        // As the controller of tokens does, which does not run here.
        let token = self.token("auth-reader", "reader", &TokenOptions::default())?;
        let authority = fs::read(self.certificate_authority()).context("reading the CA")?;
        let filled = json!({"token": STANDARD.encode(token), "ca.crt": STANDARD.encode(authority)});
        let path = "/api/v1/namespaces/auth-reader/secrets/reader";
        self.merge(path, &json!({"data": filled}))?;
        self.shell(&secret.replace(ON_PAGE, cluster))?;
        Ok(self.folder().join(format!("remote-secret-{cluster}.yaml")))
    }

    fn shell(&self, script: &str) -> Result<()> {
        let mut shell = self.client("sh")?;
        shell
            .args(["-ec", script])
            .current_dir(self.folder())
            .env("SERVER", format!("https://{}", self.address()));
        Process::spawn(shell)?.finish(START)?.ok().map(drop)
    }
}
