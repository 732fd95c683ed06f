//! `auth-daemon uninstall`: stops all daemons of a cluster and waits for their end. The chart runs it before its objects
//! are deleted, next to the ConfigMap that tells the daemons to leave nothing on their nodes.

use std::{collections::BTreeSet, env, time::Duration};

use anyhow::{Context, bail};
use auth_kubernetes::{Objects, objects::Pod};
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::Client;
use tokio::{
    runtime,
    time::{Instant, sleep},
};

use crate::discovery::kubernetes::{DAEMON_NAME, NAME_LABEL};
use auth_support::config::duration;

/// Pause between two requests.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// How long to wait for the daemons: more than their drain.
    #[arg(long, value_parser = timeout)]
    timeout: Duration,
}

fn timeout(text: &str) -> Result<Duration, String> {
    duration(text, PAUSE, LONGEST_TIMEOUT)
}

pub(super) fn uninstall(arguments: &Arguments) -> anyhow::Result<()> {
    let namespace = env::var("POD_NAMESPACE")
        .context("$POD_NAMESPACE is not set: it names the daemons' namespace")?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    runtime.block_on(async {
        let client = auth_kubernetes::connect().await?;
        stop_daemons(client, &namespace, arguments.timeout).await
    })
}

/// Deletes the DaemonSet and waits until none of its pods is left. Retries when the API server does not answer.
async fn stop_daemons(client: Client, namespace: &str, timeout: Duration) -> anyhow::Result<()> {
    let sets = Objects::<DaemonSet>::of(client.clone(), namespace);
    let daemons = Objects::<Pod>::of(client, namespace);
    let label = format!("{NAME_LABEL}={DAEMON_NAME}");
    let start = Instant::now();
    loop {
        let asked = async {
            sets.delete(DAEMON_NAME, None).await?;
            daemons.list(&label).await
        };
        let left = asked.await;
        match &left {
            Ok(pods) if pods.is_empty() => return Ok(()),
            Ok(_) => {}
            Err(error) => eprintln!("{error}"),
        }
        if start.elapsed() >= timeout {
            let pods = left.context("it is not known whether daemons are left")?;
            let nodes: BTreeSet<_> = pods.iter().flat_map(|pod| &pod.spec.node_name).collect();
            bail!(
                "daemons are left after {timeout:?}, on {nodes:?}, which may be unreachable: uninstall with helm's \
                 --no-hooks, and run auth-daemon unload on these nodes"
            );
        }
        sleep(PAUSE).await;
    }
}
