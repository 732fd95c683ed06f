//! Discovery from istiod, the control plane of an Istio mesh: workloads, services and policies by delta ADS. The API
//! server says which pods are on this node, which of them Istio's labels put into the mesh, where services are exposed,
//! and which nodes have a daemon of this kind. While either is unavailable, the last known state stays in force.

mod ambient;
mod due;
mod stream;

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
};

use due::Due;
use futures_util::{StreamExt, stream::select_all};
use kube::{Api, Client, runtime::watcher};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{
    Sink,
    kubernetes::{self, Kind, Known, Watch, watched, watched_by},
    manifest,
};
use crate::issuer::Link;
use auth_kubernetes::objects;
use auth_mesh::{Membership, MeshDefault, ObjectName, Service, Workload};
use auth_xds::{Caller, Mesh, Session, State};

/// Responses that wait to be applied.
const WAITING: usize = 16;

/// Whose state is followed, and for whom.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The mesh, as istiod calls it.
    pub mesh: Mesh,
    /// This daemon.
    pub caller: Caller,
}

/// Follows istiod and the API server, and publishes to `sink`, without end. `synced` becomes true once everything has been
/// read for the first time; nothing is published before that.
pub async fn run(
    client: Client,
    link: Link,
    settings: Settings,
    sink: Sink,
    synced: watch::Sender<bool>,
) {
    let Settings { mesh, caller } = settings;
    let own = caller.clone();
    let (updates, mut responses) = mpsc::channel(WAITING);
    let session = match &sink.lookups {
        None => Session::new(mesh.clone(), caller),
        Some(_) => Session::on_demand(mesh.clone(), caller),
    };
    let lookups = sink.lookups.clone();
    tokio::spawn(stream::keep(Arc::new(link), session, lookups, updates));
    let mut events = select_all(watches(&client, &mesh, &own));
    let mut known = Known::of(
        kubernetes::Settings {
            trust_domain: mesh.trust_domain.clone(),
            defaults: defaults(),
            services: true,
            daemons: Some(own.namespace),
            remote: None,
        },
        &KINDS,
    );
    let mut state = State::new(mesh, own.node, defaults());
    state.edit().know_daemons();
    let mut is_subscribed = false;
    let mut answered = Vec::new();
    // Of services that are exposed at addresses which istiod does not know.
    let mut pinned = HashSet::new();
    let mut is_published = false;
    let mut due = Due::default();
    loop {
        let changed = tokio::select! {
            event = events.next() => {
                let Some((kind, event)) = event else { return };
                let changed = known.take(kind, event, &mut state);
                if let Some(lookups) = &sink.lookups && kind == Kind::Service && changed {
                    pinned = state.exposed_addresses().collect();
                    lookups.pin(&pinned);
                }
                sink.unconfirmed.store(known.unconfirmed(), Ordering::Relaxed);
                changed
            }
            update = responses.recv() => {
                let Some(update) = update else { return };
                let news = !update.changes.is_empty() || is_subscribed != update.complete;
                is_subscribed = update.complete;
                for change in update.changes {
                    state.take(change);
                }
                answered.extend(update.answered);
                news || !answered.is_empty()
            }
            () = sleep_until(due.at().unwrap_or_else(Instant::now)), if due.at().is_some() => {
                due.published();
                is_published = true;
                sink.publish(state.policies(), state.snapshot());
                if let Some(lookups) = &sink.lookups {
                    lookups.answer(answered.drain(..));
                }
                if synced.send_if_modified(|synced| !std::mem::replace(synced, true)) {
                    tracing::info!("the mesh's state is read from istiod and the API server");
                }
                false
            }
        };
        let is_pinned = || {
            let answered_for: HashSet<_> = answered.iter().map(|(address, _)| *address).collect();
            pinned.is_subset(&answered_for)
        };
        if changed && is_subscribed && known.is_complete() && (is_published || is_pinned()) {
            // Connections wait for answers.
            let is_awaited = !answered.is_empty();
            due.changed(Instant::now(), is_awaited, state.missing_policies());
        }
    }
}

/// What is watched at the API server.
const KINDS: [Kind; 6] = [
    Kind::Pod,
    Kind::Daemon,
    Kind::Namespace,
    Kind::Service,
    Kind::Node,
    Kind::ServiceCidr,
];

/// Pods are in the mesh only if a label says so, as in Istio.
fn defaults() -> MeshDefault {
    MeshDefault {
        membership: Membership::Disabled,
        ..MeshDefault::default()
    }
}

fn watches(client: &Client, mesh: &Mesh, own: &Caller) -> Vec<Watch> {
    let [here, there, everywhere] = [0; 3].map(|_| mesh.trust_domain.clone());
    let on_this_node = watcher::Config::default().fields(&format!("spec.nodeName={}", own.node));
    let by_name = format!("{}={}", kubernetes::NAME_LABEL, kubernetes::DAEMON_NAME);
    let daemons = watcher::Config::default().labels(&by_name);
    let pods: Api<objects::Pod> = Api::all(client.clone());
    vec![
        watched_by(pods, Kind::Pod, on_this_node, move |mut read| {
            let membership = ambient::of_pod(&read);
            ambient::forget_other_label(&mut read.metadata);
            kubernetes::pod(read, &here)
                .map(|found| found.map(|found| ambient::with(found, membership)))
        }),
        watched_by(
            Api::namespaced(client.clone(), &own.namespace),
            Kind::Daemon,
            daemons,
            move |read| kubernetes::pod(read, &there),
        ),
        watched(
            Api::all(client.clone()),
            Kind::Namespace,
            |read: objects::Namespace| {
                Ok(Some(manifest::Object::Namespace(ambient::of_namespace(
                    &read,
                ))))
            },
        ),
        watched(
            Api::all(client.clone()),
            Kind::Service,
            move |read: objects::Service| manifest::service(read, &everywhere),
        ),
        watched(Api::all(client.clone()), Kind::Node, manifest::node),
        kubernetes::service_networks(client),
    ]
}

impl kubernetes::Model for State {
    fn edit(&mut self) -> &mut auth_mesh::Edit {
        Self::edit(self)
    }

    fn pod(&mut self, pod: Arc<Workload>) {
        self.local_pod(pod);
    }

    fn remove_pod(&mut self, name: &ObjectName) {
        self.remove_local_pod(name);
    }

    fn service(&mut self, service: Arc<Service>) {
        self.exposed_service(service);
    }

    fn remove_service(&mut self, name: &ObjectName) {
        self.remove_exposed_service(name);
    }
}
