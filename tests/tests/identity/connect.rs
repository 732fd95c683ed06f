//! A person outside the mesh connects to a service as a service account, without privileges.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use mesh_tests::{
    Ca, CaOptions, Context, Daemon, DaemonOptions, Finished, Mesh, Nginx, OidcIssuer, Process,
    Result, TIMEOUT, eventually_ok,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::common::pair;
use crate::common::with_ca::{spiffe, wait_certified};

const SERVICE: &str = "default/web:80";
const ALICE: &str = "alice@example.com";
const FETCH: [&str; 4] = [
    "--",
    "sh",
    "-c",
    "curl -sS --max-time 30 http://$AUTH_DAEMON_ADDRESS/",
];

/// Fields are dropped in this order: the programs, then the mesh.
struct Stage {
    _nginx: Nginx,
    /// Of the server's node.
    far: Daemon,
    _near: Daemon,
    ca: Ca,
    login: OidcIssuer,
    body: String,
    mesh: Mesh,
}

impl Stage {
    /// People in the group `oncall` may act as `support` and as `intern`. A policy admits `support` alone.
    fn start() -> Result<Self> {
        let login = OidcIssuer::new("https://login.example")?;
        let mesh = pair::builder().start()?;
        let accounts = json!([
            {"account": "default/support", "groups": ["oncall"]},
            {"account": "default/intern", "groups": ["oncall"]},
        ]);
        let ca = mesh.start_ca(&CaOptions::default().people(&login, accounts))?;
        let daemons = mesh.start_daemons_with(&DaemonOptions::default().ca(&ca))?;
        let [near, far] = daemons
            .try_into()
            .map_err(|_| mesh_tests::Error::msg("not two"))?;
        wait_certified(&far)?;
        mesh.manifests().apply(&json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {
                "selector": {"matchLabels": {"app": "web"}},
                "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/support"]}}]}],
            },
        }))?;
        let body = format!("the-secret-{}", mesh.id());
        Ok(Self {
            _nginx: Nginx::start(mesh.pod("web").place(), 8080, &body)?,
            far,
            _near: near,
            ca,
            login,
            body,
            mesh,
        })
    }

    fn token(&self, groups: &[&str]) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        self.login.token(&json!({
            "aud": "mesh", "exp": now + 600, "sub": "u1", "email": ALICE, "email_verified": true,
            "groups": groups,
        }))
    }

    /// Connects as an account with a token of the group `oncall`, runs a command, and checks that nothing has shown the token.
    fn connect(&self, account: &str, command: &[&str]) -> Result<Finished> {
        let token = self.token(&["oncall"])?;
        let arguments = [&[SERVICE, "--as", account], command].concat();
        let ended = self
            .ca
            .connect(&self.mesh, &token, &arguments)?
            .finish(TIMEOUT)?;
        let texts = [
            &ended.stdout,
            &ended.stderr,
            &self.ca.log_text(),
            &self.far.log_text(),
        ];
        for part in token.split('.').skip(1) {
            assert!(!texts.iter().any(|text| text.contains(part)), "{texts:?}");
        }
        Ok(ended)
    }

    fn access_line(&self, account: &str, result: &str) -> Result<Value> {
        let identity = spiffe(account);
        self.far
            .wait_for_access("the person's connection", TIMEOUT, |line| {
                line["client_identity"] == *identity && line["result"] == result
            })
    }
}

fn no_setpriv(test: &str) -> bool {
    let missing = !Path::new("/usr/bin/setpriv").exists();
    if missing {
        println!("SKIPPED {test}: no setpriv (util-linux)");
    }
    missing
}

#[test]
fn a_person_reaches_a_strict_service_as_an_account_that_the_policy_admits() -> Result<()> {
    if no_setpriv("a_person_reaches_a_strict_service_as_an_account_that_the_policy_admits") {
        return Ok(());
    }
    let stage = Stage::start()?;
    let recording = stage.mesh.wire().capture()?;
    // The policy may not be in force yet, but it admits this account.
    let fetched = stage.connect("default/support", &FETCH)?.ok()?;
    assert!(fetched.stdout.contains(&stage.body), "{fetched:?}");
    let line = stage.access_line("support", "ok")?;
    assert_eq!(line["client_person"], format!("oidc:{ALICE}"), "{line}");
    assert_eq!(line["path"], "hbone", "{line}");
    assert_eq!(line["server_identity"], spiffe("web"), "{line}");
    let recorded = recording.stop()?;
    assert!(!recorded.contains(stage.body.as_bytes()));

    // Of another account, which the policy does not admit.
    eventually_ok(TIMEOUT, "the policy to be in force", || {
        let ended = stage.connect("default/intern", &FETCH)?;
        // The policy also ends a connection that was admitted before it.
        let refused = !ended.status.success() && ended.stderr.contains("its node forbids it");
        anyhow::ensure!(refused, "{ended:?}");
        Ok(())
    })?;
    let line = stage.access_line("intern", "refused")?;
    assert_eq!(line["client_person"], format!("oidc:{ALICE}"), "{line}");
    let reason = line["reason"].as_str().context("no reason")?;
    assert!(reason.contains("denied"), "{line}");

    // An account that nobody may act as.
    let refused = stage.connect("default/web", &FETCH)?;
    assert!(!refused.status.success());
    assert!(refused.stderr.contains("may not act as"), "{refused:?}");
    assert!(!refused.stdout.contains(&stage.body));
    // A person who may act as none.
    let arguments = [&[SERVICE, "--as", "default/support"], &FETCH[..]].concat();
    let token = stage.token(&["dev"])?;
    let refused = stage
        .ca
        .connect(&stage.mesh, &token, &arguments)?
        .finish(TIMEOUT)?;
    assert!(
        refused.stderr.contains("maps neither the name nor a group"),
        "{refused:?}"
    );

    let audited = stage.ca.logs();
    let issued = audited
        .iter()
        .find(|line| line["event"] == "issued" && line["caller"] == format!("person oidc:{ALICE}"));
    let issued = issued.context("the issuance is not audited")?;
    assert_eq!(issued["identity"], spiffe("support"), "{issued}");
    Ok(())
}

#[test]
fn a_command_ends_the_connection_and_gives_its_exit_code() -> Result<()> {
    if no_setpriv("a_command_ends_the_connection_and_gives_its_exit_code") {
        return Ok(());
    }
    let stage = Stage::start()?;
    let ended = stage.connect("default/support", &["--", "sh", "-c", "exit 7"])?;
    assert_eq!(ended.code(), Some(7), "{ended:?}");
    let ended = stage.connect("default/support", &["--", "/nowhere"])?;
    assert!(ended.stderr.contains("cannot run /nowhere"), "{ended:?}");
    let ended = stage.connect("default/support", &["--listen", "0.0.0.0:0"])?;
    assert!(ended.stderr.contains("--share"), "{ended:?}");

    // Without a command, it forwards until it is stopped.
    let arguments = [SERVICE, "--as", "default/support"];
    let token = stage.token(&["oncall"])?;
    let mut forwards = stage.ca.connect(&stage.mesh, &token, &arguments)?;
    let address = forwards.wait_for_line("its address", TIMEOUT, |line| {
        line.starts_with("127.0.0.1:").then(|| line.to_owned())
    })?;
    let outside = stage.mesh.outside();
    for _ in 0..3 {
        let url = format!("http://{address}/");
        let fetched = outside
            .run("curl", ["-sS", "--max-time", "30", &url])?
            .ok()?;
        assert!(fetched.stdout.contains(&stage.body), "{fetched:?}");
    }
    forwards.signal(Signal::SIGINT)?;
    forwards.wait(TIMEOUT)?;
    Ok(())
}

#[test]
fn documented_command_fetches_from_the_service() -> Result<()> {
    let page = include_str!("../../../docs/CONNECT.md");
    let commands = page.split("```sh\n").skip(1);
    let commands = commands.filter_map(|rest| Some(rest.split_once("```")?.0));
    let command = { commands }
        .find(|command| command.contains("--token-file"))
        .context("no command")?;
    let stage = Stage::start()?;
    let outside = stage.mesh.outside();
    // A folder with the files that the command names.
    let folder = outside.folder().join("connect");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("id-token"), stage.token(&["oncall"])?)?;
    std::os::unix::fs::symlink(stage.ca.roots(), folder.join("root-cert.pem"))?;
    std::os::unix::fs::symlink(stage.mesh.manifests().folder(), folder.join("manifests"))?;
    std::os::unix::fs::symlink(mesh_tests::auth_daemon()?, folder.join("auth-daemon"))?;
    let path = format!("{}:{}", folder.display(), std::env::var("PATH")?);
    let mut shell = outside.command("sh")?;
    shell.current_dir(&folder).env("PATH", path).arg("-c");
    shell.arg(command.replace("ca.mesh.example:15012", stage.ca.address()));
    let fetched = Process::spawn(shell)?.finish(TIMEOUT)?.ok()?;
    assert!(fetched.stdout.contains(&stage.body), "{fetched:?}");
    Ok(())
}
