//! Reconciles objects of the cluster with kube's controller runtime. Only the leader does this.

use std::{convert::Infallible, fmt::Debug, sync::Arc, time::Duration};

use auth_kubernetes::follow;
use futures_util::{
    FutureExt, Stream, StreamExt,
    future::ready,
    stream::{self, select_all},
};
use kube::{
    Api, Resource,
    runtime::{
        WatchStreamExt,
        controller::{Action, Config, Error, applier},
        reflector::{self, ObjectRef, reflector},
        watcher,
    },
};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::authority::Published;

/// Objects that are reconciled at the same time.
const AT_ONCE: u16 = 8;
/// When to reconcile an object again after a failure.
pub(crate) const RETRY: Duration = Duration::from_secs(15);

/// Calls `reconcile` for each object of `api`: at first, when it changes, when it is in `related`, when `published`
/// changes, and when the time has passed that the last call returned. Calls `gone` with the name of an object in
/// `related` that does not exist, and of one that has been deleted. `what` names the objects in the log. Runs forever.
pub(crate) async fn reconcile_all<K, Reconciled, Gone>(
    api: Api<K>,
    what: &'static str,
    related: impl Stream<Item = ObjectRef<K>> + Send,
    published: watch::Receiver<Arc<Published>>,
    reconcile: impl Fn(Arc<K>) -> Reconciled + Send + Sync,
    gone: impl Fn(String) -> Gone + Send + Sync,
) where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
    Reconciled: Future<Output = Duration> + Send,
    Gone: Future<Output = ()> + Send,
{
    let (objects, writer) = reflector::store::<K>();
    let of = |object: &K| ObjectRef::from_obj(object);
    let own = touched(reflector(
        writer,
        follow(api, watcher::Config::default(), what).map(Ok),
    ));
    let known = objects.clone();
    let changes = stream::unfold(published, |mut published| async move {
        published.changed().await.ok()?;
        Some(((), published))
    });
    let all = changes.flat_map(|()| {
        let known: Vec<_> = known.state().iter().map(|object| of(object)).collect();
        stream::iter(known)
    });
    let queue = select_all([
        own.map(|object| of(&object)).boxed(),
        related.boxed(),
        all.boxed(),
    ]);
    applier(
        |object, _| {
            reconcile(object)
                .map(|again| Ok(Action::requeue(again)))
                .boxed()
        },
        |_, error: &Infallible, _| match *error {},
        Arc::new(()),
        objects,
        queue.map(Ok::<_, Infallible>),
        Config::default().concurrency(AT_ONCE),
    )
    .for_each(|outcome| async {
        if let Err(Error::ObjectNotFound(object)) = outcome {
            gone(object.name.clone()).await;
        }
    })
    .await;
}

/// The objects that `events` are about, whether they exist or not.
pub(crate) fn touched<K: Send>(
    events: impl Stream<Item = watcher::Result<watcher::Event<K>>> + Send,
) -> impl Stream<Item = K> + Send {
    events
        .touched_objects()
        .filter_map(|object| ready(object.ok()))
}
