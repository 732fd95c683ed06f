//! Discovery from the Kubernetes API: watches objects, and keeps the last known state while the API is unavailable.

mod due;
mod known;
mod remote;

use std::{
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{Stream, StreamExt, stream::select_all};
use kube::{Api, Client, Resource, ResourceExt, core::ApiResource, runtime::watcher};
use serde::de::DeserializeOwned;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;

use due::Due;
use known::Seen;
pub use known::{DAEMON_NAME, NAME_LABEL};
pub(super) use known::{Event, Known, Model};
use remote::Remote;

use super::{
    Sink,
    manifest::{self, Object},
};
use crate::config::RemoteClusters;
use auth_kubernetes::{follow, is_defined, objects, served};
use auth_mesh::{Edit, Membership, MeshDefault, ObjectName, Snapshot, TrustDomain, policy::api};
use auth_support::backoff;

/// Time to wait for more changes after the first.
pub(super) const SETTLE: Duration = Duration::from_millis(5);
/// Initial delay before asking again whether the cluster serves a kind, after an error. `ABSENT` is the maximum delay,
/// and the interval while the cluster does not serve the kind.
const RETRY: Duration = Duration::from_secs(1);
const ABSENT: Duration = Duration::from_secs(30);

/// What is watched, and how it is interpreted.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Trust domain of the identities.
    pub trust_domain: TrustDomain,
    /// Which pods are in the mesh by default.
    pub defaults: MeshDefault,
    /// Whether namespaces, services, nodes and networks are watched too. Pods are enough for a user that only needs to know where
    /// identities run.
    pub services: bool,
    /// Namespace of the node daemons' own pods. A node without a ready one does not serve the tunnel protocol. `None`:
    /// every node is assumed to have a daemon.
    pub daemons: Option<String>,
    /// The remote clusters whose pods and services are merged into this cluster's. `None`: no Secret is read.
    pub remote: Option<RemoteClusters>,
}

/// Watches the cluster and publishes to `sink`, without end. `synced` becomes true once everything has been read for
/// the first time; nothing is published before that. Remote clusters are waited for, but for some seconds only.
pub async fn run(client: Client, settings: Settings, sink: Sink, synced: watch::Sender<bool>) {
    let mut events = select_all(watches(&client, &settings, sink.policies.is_some()));
    let mut edit = Edit::from(Snapshot::with_defaults(settings.defaults.clone()));
    if settings.daemons.is_some() {
        edit.know_daemons();
    }
    let mut remote = Remote::follow(&client, &settings, sink.remote.clone());
    let mut known = Known::new(settings, sink.policies.is_some());
    let mut due = Due::default();
    loop {
        let has_changed = tokio::select! {
            event = events.next() => {
                let Some((kind, event)) = event else { return };
                let has_changed = known.take(kind, event, &mut edit);
                sink.unconfirmed.store(known.unconfirmed(), Ordering::Relaxed);
                has_changed
            }
            change = remote.next() => remote.take(change, &mut edit).await,
            () = sleep_until(due.at().unwrap_or_else(Instant::now)), if due.at().is_some() => {
                sink.publish(known.policies(), edit.snapshot());
                if due.published() {
                    remote.warn_of_unread();
                }
                if synced.send_if_modified(|synced| !std::mem::replace(synced, true)) {
                    tracing::info!(objects = known.count(), "the cluster's objects are read");
                }
                false
            }
        };
        let is_read = known.is_complete();
        due.update(Instant::now(), has_changed, is_read, || remote.is_settled());
    }
}

/// Kind of a watched object. Each kind is read on its own, and all of them before the first snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Namespace,
    Pod,
    /// A node daemon's own pod, of which only the node and the readiness count.
    Daemon,
    Service,
    Slice,
    Node,
    ServiceCidr,
    Policy(api::Kind),
}

impl Kind {
    /// The kinds that are watched because of [`Settings::services`].
    const OF_SERVICES: [Self; 5] = [
        Self::Namespace,
        Self::Service,
        Self::Slice,
        Self::Node,
        Self::ServiceCidr,
    ];

    fn plural(self) -> &'static str {
        match self {
            Self::Namespace => "namespaces",
            Self::Pod | Self::Daemon => "pods",
            Self::Service => "services",
            Self::Slice => "endpointslices",
            Self::Node => "nodes",
            Self::ServiceCidr => "servicecidrs",
            Self::Policy(api::Kind::Authorization) => "authorizationpolicies",
            Self::Policy(api::Kind::Peer) => "peerauthentications",
        }
    }
}

pub(super) type Watch = Pin<Box<dyn Stream<Item = (Kind, Event)> + Send>>;

fn watches(client: &Client, settings: &Settings, policies: bool) -> Vec<Watch> {
    let (pods, services) = (settings.trust_domain.clone(), settings.trust_domain.clone());
    let mut watches = vec![watched(Api::all(client.clone()), Kind::Pod, move |read| {
        pod(read, &pods)
    })];
    if settings.services {
        watches.push(watched(Api::all(client.clone()), Kind::Namespace, |read| {
            manifest::namespace(&read)
        }));
        watches.push(watched(
            Api::all(client.clone()),
            Kind::Service,
            move |read| manifest::service(read, &services),
        ));
        watches.push(watch_if_served(
            client,
            Kind::Slice,
            (SLICES_GROUP, &SLICES_VERSIONS),
            |client, _| {
                let config = watcher::Config::default().labels(OWN_SLICES);
                watched_by(Api::all(client), Kind::Slice, config, manifest::slice)
            },
        ));
        watches.push(watched(
            Api::all(client.clone()),
            Kind::Node,
            manifest::node,
        ));
        watches.push(service_networks(client));
    }
    if policies {
        watches.extend(POLICIES.map(|kind| {
            let (group, here) = (api::GROUP, Kind::Policy(kind));
            watch_if_served(
                client,
                here,
                (group, &api::VERSIONS),
                move |client, version| policies_of(client, kind, version),
            )
        }));
    }
    watches
}

/// Watches the networks of services.
pub(super) fn service_networks(client: &Client) -> Watch {
    watch_if_served(
        client,
        Kind::ServiceCidr,
        (NETWORKS_GROUP, &NETWORKS_VERSIONS),
        |client, _| watched(Api::all(client), Kind::ServiceCidr, manifest::service_cidr),
    )
}

const POLICIES: [api::Kind; 2] = [api::Kind::Authorization, api::Kind::Peer];

/// API group of endpoint slices, and the selector of the slices that are used. For services that select pods, the pods
/// themselves provide more information, and sooner.
const SLICES_GROUP: &str = "discovery.k8s.io";
const SLICES_VERSIONS: [&str; 1] = ["v1"];
const OWN_SLICES: &str = "endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io";

/// API group of the networks of services, which Kubernetes has since 1.33.
const NETWORKS_GROUP: &str = "networking.k8s.io";
const NETWORKS_VERSIONS: [&str; 1] = ["v1"];

/// Returns the version in which the cluster serves a kind. `None` if it has no such kind.
async fn served_version(
    client: &Client,
    kind: Kind,
    group: &str,
    versions: &[&'static str],
) -> Result<Option<&'static str>, String> {
    let version = served(client, group, versions, kind.plural()).await;
    if let Some(version) = version.map_err(|error| error.to_string())? {
        return Ok(Some(version));
    }
    // An API server that has just started serves custom resources a moment later than it answers. Taking that for a
    // cluster without policies would allow everything.
    let is_policy = matches!(kind, Kind::Policy(_));
    match is_policy
        && is_defined(client, group, kind.plural())
            .await
            .map_err(|error| error.to_string())?
    {
        true => Err("they are defined, but the API server does not serve them (yet)".to_owned()),
        false => Ok(None),
    }
}

/// Watches the objects of a kind. A cluster that does not serve the kind, in one of these versions of its group, has no
/// such objects, and is asked again periodically.
fn watch_if_served(
    client: &Client,
    kind: Kind,
    (group, versions): (&'static str, &'static [&'static str]),
    watch: impl FnOnce(Client, &'static str) -> Watch + Send + 'static,
) -> Watch {
    let (events, watched) = mpsc::channel(64);
    let client = client.clone();
    tokio::spawn(async move {
        let (mut failures, mut absent) = (0, false);
        let version = loop {
            match served_version(&client, kind, group, versions).await {
                Ok(Some(version)) => break version,
                Ok(None) => {
                    if !std::mem::replace(&mut absent, true) {
                        tracing::info!(
                            "the cluster does not have {}.{group} in {}: there are none",
                            kind.plural(),
                            versions.join(" or ")
                        );
                        for event in [Event::Init, Event::InitDone] {
                            if events.send((kind, event)).await.is_err() {
                                return;
                            }
                        }
                    }
                    sleep(ABSENT).await;
                }
                Err(error) => {
                    tracing::error!(%error, "cannot ask whether there are {}", kind.plural());
                    sleep(backoff::pause(RETRY, ABSENT, failures, rand::random())).await;
                    failures += 1;
                }
            }
        };
        let mut watch = watch(client, version);
        while let Some(event) = watch.next().await {
            if events.send(event).await.is_err() {
                return;
            }
        }
    });
    ReceiverStream::new(watched).boxed()
}

fn policies_of(client: Client, kind: api::Kind, version: &str) -> Watch {
    let here = Kind::Policy(kind);
    let resource = ApiResource {
        group: api::GROUP.into(),
        version: version.into(),
        api_version: format!("{}/{version}", api::GROUP),
        kind: kind.as_str().into(),
        plural: here.plural().into(),
    };
    let api = Api::<objects::Custom>::all_with(client, &resource);
    watched(api, here, move |read| {
        let mut document = read.content;
        // Items of a list may omit what the list already specifies.
        document["apiVersion"] = resource.api_version.as_str().into();
        document["kind"] = resource.kind.as_str().into();
        let policy = api::Object::read(&document).map(Arc::new);
        Ok(policy.map(Object::Policy))
    })
}

/// Annotations that a kubelet writes on a mirror pod, which shows one of its static pods in the API.
const MIRROR: [&str; 2] = ["kubernetes.io/config.mirror", "kubernetes.io/config.source"];

/// Returns why a pod has no identity, if it has none. Kubernetes gives every pod a service account, except for mirror
/// pods. With the credentials of a kubelet, these can be created in any namespace (the NodeRestriction plugin only requires
/// that they are bound to its node), so their namespace proves nothing.
fn without_identity(pod: &objects::Pod) -> Option<&'static str> {
    let annotations = pod.metadata.annotations.as_ref();
    if annotations.is_some_and(|all| MIRROR.iter().any(|name| all.contains_key(*name))) {
        return Some("it is a mirror pod, which a kubelet wrote");
    }
    let account = pod.spec.service_account_name.as_deref();
    account
        .is_none_or(str::is_empty)
        .then_some("it has no service account")
}

/// Annotation that a kubelet writes on a mirror pod: the identifier that it uses for the static pod, also in the names of
/// cgroups. 32 hexadecimal digits without dashes, so never the UID of another pod.
const STATIC_POD: &str = "kubernetes.io/config.hash";

/// The identifier of the static pod that a mirror pod shows.
fn static_pod(pod: &objects::Pod) -> Option<String> {
    let annotations = pod.metadata.annotations.as_ref()?;
    annotations.get(MIRROR[0])?;
    let hash = annotations.get(STATIC_POD)?;
    let is_hash = hash.len() == 32 && hash.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hash.then(|| hash.clone())
}

/// Parses a pod. A pod without an identity is outside the mesh, whatever its labels say.
pub(crate) fn pod(pod: objects::Pod, trust_domain: &TrustDomain) -> Result<Option<Object>, String> {
    let why = without_identity(&pod);
    let static_pod = static_pod(&pod);
    let mut read = readable(pod, trust_domain)?;
    if let (Some(why), Some(Object::Pod(pod))) = (why, &mut read) {
        let pod = Arc::make_mut(pod);
        pod.membership = Some(Membership::Disabled);
        pod.without_identity = true;
        if let Some(identifier) = static_pod {
            pod.uid = identifier;
        }
        // The node's own network is outside the mesh anyway.
        if !pod.host_network {
            tracing::info!(pod = %pod.name, node = pod.node, "pod is outside the mesh: {why}");
        }
    }
    Ok(read)
}

/// Parses a pod. Ignores a mesh label that cannot be read, so that a typo does not remove the pod from the mesh, and an
/// annotation that names a netns: whoever may write a pod's object could name another pod's netns, or any file of the node.
fn readable(mut pod: objects::Pod, trust_domain: &TrustDomain) -> Result<Option<Object>, String> {
    let annotations = pod.metadata.annotations.as_mut();
    if annotations.is_some_and(|all| all.remove(manifest::NETNS_ANNOTATION).is_some()) {
        tracing::warn!(
            pod = %name(&pod),
            "annotation {} ignored: it counts only with file discovery; remove it from the pod",
            manifest::NETNS_ANNOTATION
        );
    }
    manifest::pod(pod.clone(), trust_domain).or_else(|error| {
        let (labels, annotations) = (&mut pod.metadata.labels, &mut pod.metadata.annotations);
        for values in [labels, annotations].into_iter().flatten() {
            values.remove(manifest::MESH_LABEL);
        }
        let read = manifest::pod(pod, trust_domain)?;
        tracing::error!("{error}; the value is ignored");
        Ok(read)
    })
}

pub(super) fn watched<K>(
    api: Api<K>,
    kind: Kind,
    parse: impl Fn(K) -> Result<Option<Object>, String> + Send + 'static,
) -> Watch
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    watched_by(api, kind, watcher::Config::default(), parse)
}

pub(super) fn watched_by<K>(
    api: Api<K>,
    kind: Kind,
    config: watcher::Config,
    parse: impl Fn(K) -> Result<Option<Object>, String> + Send + 'static,
) -> Watch
where
    K: Resource + Clone + DeserializeOwned + std::fmt::Debug + Send + 'static,
{
    let events = follow(api, config, kind.plural());
    events
        .map(move |event| (kind, parsed(event, &parse)))
        .boxed()
}

/// Returns the event with its object parsed.
fn parsed<K: Resource>(
    event: watcher::Event<K>,
    parse: impl Fn(K) -> Result<Option<Object>, String>,
) -> Event {
    let seen = |object: K| Seen {
        name: name(&object),
        uid: object.uid().unwrap_or_default(),
        object: parse(object),
    };
    match event {
        watcher::Event::Apply(object) => Event::Apply(seen(object)),
        watcher::Event::Delete(object) => Event::Delete(name(&object)),
        watcher::Event::Init => Event::Init,
        watcher::Event::InitApply(object) => Event::InitApply(seen(object)),
        watcher::Event::InitDone => Event::InitDone,
    }
}

fn name(object: &impl Resource) -> ObjectName {
    ObjectName {
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use axum::{body::Body, http};
    use serde_json::{Value, json};
    use tower::service_fn;

    use super::*;

    /// An API server without pods, which lists `secrets` once `is_open`.
    fn api_server(secrets: Value, is_open: watch::Receiver<bool>) -> Client {
        let answer = move |request: http::Request<kube::client::Body>| {
            let (secrets, mut is_open) = (secrets.clone(), is_open.clone());
            async move {
                let uri = request.uri();
                if uri.query().unwrap_or_default().contains("watch=true") {
                    std::future::pending::<()>().await;
                }
                let mut items = json!([]);
                if uri.path().ends_with("/secrets") {
                    is_open.wait_for(|is_open| *is_open).await.unwrap();
                    items = secrets;
                }
                let list = json!({"metadata": {"resourceVersion": "1"}, "items": items});
                Ok::<_, Infallible>(http::Response::new(Body::from(list.to_string())))
            }
        };
        Client::new(service_fn(answer), "default")
    }

    #[tokio::test]
    async fn nothing_is_published_before_remote_clusters_are_known() {
        const SOON: Duration = Duration::from_millis(300);
        let settings = Settings {
            trust_domain: "cluster.local".parse().unwrap(),
            defaults: MeshDefault::default(),
            services: false,
            daemons: None,
            remote: Some(RemoteClusters {
                namespace: "auth-clusters".to_owned(),
                trust_domains: std::collections::BTreeMap::new(),
            }),
        };
        // A kubeconfig that cannot be used, so that the cluster need not be waited for.
        let kubeconfig = k8s_openapi::ByteString(b"{}".to_vec());
        let secret = json!({"metadata": {"name": "east"}, "data": {"east": kubeconfig}});
        let (open, is_open) = watch::channel(false);
        let client = api_server(json!([secret]), is_open);
        let (synced, mut is_synced) = watch::channel(false);
        let sink = Sink::default();
        let status = sink.remote.clone();
        tokio::spawn(run(client, settings, sink, synced));
        let mut is_synced_within = async |time| {
            let synced = is_synced.wait_for(|synced| *synced);
            tokio::time::timeout(time, synced).await.is_ok()
        };
        assert!(!is_synced_within(SOON).await, "no secret is listed");
        open.send_replace(true);
        let time = due::REMOTE_WAIT / 2;
        assert!(is_synced_within(time).await, "the cluster cannot be read");
        assert!(status.current()[0].error.is_some());
    }

    #[test]
    fn mirror_pods_are_known_by_the_hash_of_their_static_pods() {
        let hash = "0123456789abcdef0123456789abcdef";
        let uid = "01234567-89ab-cdef-0123-456789abcdef";
        for (mirror, found, expected) in [
            (true, hash, hash),
            // Not those of another pod.
            (true, uid, "u1"),
            (false, hash, "u1"),
        ] {
            let mut object = json!({
                "metadata": {
                    "name": "web", "namespace": "default", "uid": "u1",
                    "annotations": {STATIC_POD: found},
                },
                "spec": {"nodeName": "a", "serviceAccountName": "b", "containers": []}, "status": {},
            });
            if mirror {
                object["metadata"]["annotations"][MIRROR[0]] = hash.into();
            }
            let object = serde_json::from_value(object).unwrap();
            let Ok(Some(Object::Pod(read))) = pod(object, &"cluster.local".parse().unwrap()) else {
                panic!("not read");
            };
            assert_eq!(read.uid, expected, "{found}");
            assert_eq!(read.membership == Some(Membership::Disabled), mirror);
        }
    }

    #[test]
    fn a_pods_object_names_no_netns() {
        let object = json!({
            "metadata": {
                "name": "web", "namespace": "default",
                "annotations": {manifest::NETNS_ANNOTATION: "/proc/1/root/tmp/fifo"},
            },
            "spec": {"nodeName": "a", "containers": []}, "status": {},
        });
        let object = serde_json::from_value(object).unwrap();
        let read = pod(object, &"cluster.local".parse().unwrap()).unwrap();
        let Some(Object::Pod(workload)) = read else {
            panic!("{read:?}");
        };
        assert_eq!(workload.netns, None);
    }
}
