//! `auth-daemon ui`: serves the page that shows the mesh, with the data of all daemons.

use std::{
    io::Write,
    net::Ipv4Addr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use axum::{
    Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, State},
    http::{StatusCode, Uri},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::value::RawValue;
use tokio::{net::TcpListener, time::timeout};

use super::daemons::{Daemon, Daemons, Selection, Unanswered};
use crate::admin::{Missing, Nodes, Reachable, with_page};
use auth_support::http_server::answer;

/// What the page may ask a daemon for: the beginnings of paths.
const READABLE: [&str; 4] = ["live/", "summary", "mesh", "policy/pod/"];
/// What it may ask with a question.
const ASKABLE: &str = "policy/check";
/// Largest question, in bytes.
const MAX_QUESTION: usize = 4096;
/// Maximum time for a daemon's answer. Shorter than the server's own limit, so that the page learns the reason.
const DEADLINE: Duration = Duration::from_secs(8);
/// How often daemons are looked for: nodes join, and pods are replaced.
const REFRESH: Duration = Duration::from_secs(10);
/// How long the page waits between two questions to a daemon, in milliseconds.
const PAUSE: u64 = 500;
/// The same through an API server, and for each daemon if there are many: it serves at most ten requests a second.
const PAUSE_CLUSTER: u64 = 1000;
const PAUSE_EACH: u64 = 100;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Port of the page on 127.0.0.1. By default, any free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
    #[command(flatten)]
    daemons: Selection,
}

/// The daemons that the page may ask.
struct Ui {
    daemons: Arc<Daemons>,
    found: Mutex<(Vec<Daemon>, Vec<Unanswered>)>,
}

pub(super) fn ui(arguments: &Arguments) -> anyhow::Result<()> {
    let daemons = Arc::new(Daemons::find(&arguments.daemons)?);
    let found = (daemons.list().to_vec(), daemons.missing().to_vec());
    let ui = Arc::new(Ui {
        daemons: daemons.clone(),
        found: Mutex::new(found),
    });
    daemons.run(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, arguments.port)).await;
        let listener = listener.with_context(|| {
            format!(
                "cannot listen on 127.0.0.1:{}; --port takes another port",
                arguments.port
            )
        })?;
        // A command without standard output still serves the page.
        let _ = writeln!(std::io::stdout(), "http://{}/", listener.local_addr()?);
        eprintln!("auth-daemon: shows the mesh at this address until it is stopped with Ctrl-C");
        tokio::join!(answer(listener, routes(ui.clone())), ui.refresh());
        Ok(())
    })
}

fn routes(ui: Arc<Ui>) -> Router {
    let data = Router::new()
        .route("/nodes", get(nodes))
        .route("/node/{node}/{*path}", get(read).post(ask))
        .layer(DefaultBodyLimit::max(MAX_QUESTION))
        .with_state(ui);
    with_page(data)
}

async fn nodes(State(ui): State<Arc<Ui>>) -> Json<Nodes> {
    let found = ui.found.lock().unwrap_or_else(PoisonError::into_inner);
    let (list, missing) = &*found;
    let count = list.len().try_into().unwrap_or(u64::MAX);
    Json(Nodes {
        nodes: (list.iter())
            .map(|daemon| Reachable {
                name: daemon.name.clone(),
                at: vec!["node".to_owned(), daemon.name.clone()],
            })
            .collect(),
        missing: (missing.iter())
            .map(|missing| Missing {
                node: missing.node.clone(),
                reason: missing.reason.clone(),
            })
            .collect(),
        pause: match ui.daemons.in_cluster() {
            true => PAUSE_CLUSTER.max(PAUSE_EACH.saturating_mul(count)),
            false => PAUSE,
        },
    })
}

async fn read(
    State(ui): State<Arc<Ui>>,
    Path(target): Path<(String, String)>,
    uri: Uri,
) -> Response {
    let is_readable = |path: &str| READABLE.iter().any(|start| path.starts_with(start));
    ui.forward(target.0, &uri, is_readable, None).await
}

async fn ask(
    State(ui): State<Arc<Ui>>,
    Path(target): Path<(String, String)>,
    uri: Uri,
    question: Bytes,
) -> Response {
    let is_askable = |path: &str| path == ASKABLE;
    ui.forward(target.0, &uri, is_askable, Some(question.to_vec()))
        .await
}

impl Ui {
    /// Asks the daemon `node` for what follows its name in `uri`.
    async fn forward(
        &self,
        node: String,
        uri: &Uri,
        is_allowed: impl Fn(&str) -> bool,
        question: Option<Vec<u8>>,
    ) -> Response {
        // As it was encoded: names may contain any character.
        let path = uri.path().splitn(4, '/').nth(3).unwrap_or_default();
        if !is_allowed(path) {
            let error = format!("the page does not ask daemons for {path}\n");
            return (StatusCode::NOT_FOUND, error).into_response();
        }
        let daemon = {
            let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
            found.0.iter().find(|daemon| daemon.name == node).cloned()
        };
        let Some(daemon) = daemon else {
            let error = format!("no daemon of node {node} is known\n");
            return (StatusCode::NOT_FOUND, error).into_response();
        };
        let path = format!("/{path}");
        let asked = daemon.request::<Box<RawValue>>(&path, question);
        match timeout(DEADLINE, asked).await {
            Ok(Ok(answer)) => Json(answer).into_response(),
            Ok(Err(error)) => (StatusCode::BAD_GATEWAY, format!("{error:#}")).into_response(),
            Err(_) => {
                let error = format!("node {node} does not answer within {DEADLINE:?}");
                (StatusCode::GATEWAY_TIMEOUT, error).into_response()
            }
        }
    }

    /// Looks for daemons until the runtime ends.
    async fn refresh(&self) {
        loop {
            tokio::time::sleep(REFRESH).await;
            // If that fails, the known daemons are asked again.
            if let Ok(now) = self.daemons.look().await {
                *self.found.lock().unwrap_or_else(PoisonError::into_inner) = now;
            }
        }
    }
}
