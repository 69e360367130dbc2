//! The Objects service: seven verbs over JSON, generic over kinds. Thin: every rule is elsewhere.

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use gantry_api::decode;
use gantry_api::kinds::{KINDS, Kind};
use gantry_api::proto::objects_server::Objects;
use gantry_api::proto::{
    DeleteRequest, GetRequest, KindsReply, KindsRequest, ListRequest, Object, ObjectKey,
    ObjectList, PatchRequest, TableReply, WatchEvent, WatchRequest, WriteReply, WriteRequest,
    kinds_reply,
};
use gantry_api::status::Status;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response};

use super::audit::Call;
use super::identity::Identity;
use super::merge::Patch;
use super::object::{metadata_text, present};
use super::rbac::{Attributes, Judge, caller};
use super::registry::{DeleteOptions, Propagation, Registry};
use super::rules::Part;
use super::table::Renderer;
use super::tokens::{self, Tokens};
use super::view::{View, kind_of_key};
use super::write::{WriteOptions, Written};
use super::{eviction, resize, scale, watch};

/// Events of a watch on their way.
type Events = Pin<Box<dyn Stream<Item = Result<WatchEvent, tonic::Status>> + Send>>;

/// What one write may take: a store that does not answer within it has failed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What asking whose token it is needs.
const TOKEN_REVIEW: Attributes<'_> = Attributes {
    verb: "create",
    group: "authentication.k8s.io",
    resource: "tokenreviews",
    subresource: "",
    namespace: "",
    name: "",
};

/// The subresource that adds ephemeral containers to a pod.
const EPHEMERAL: &str = "ephemeralcontainers";

/// The subresource that deletes a pod if its disruption budget allows.
const EVICTION: &str = "eviction";

/// The service over one registry.
pub(super) struct ObjectsService {
    registry: Registry,
    tokens: Tokens,
    stop: CancellationToken,
}

/// Subresources that update and patch take.
const CHANGEABLE: &[&str] = &["status", "scale", "resize", EPHEMERAL];

/// A create, update or apply, taken apart.
struct Write {
    target: Target,
    object: Value,
    options: WriteOptions,
}

impl Write {
    fn new(request: WriteRequest, subresources: &[&str]) -> Result<Write, Status> {
        refuse_subresource(&request.subresource, subresources)?;
        let object = decode::parse(&request.json)?;
        Ok(Write {
            target: Target::new(request.key, &object)?,
            object,
            options: WriteOptions {
                dry_run: request.dry_run,
                strict: request.strict,
            },
        })
    }
}

/// What a write request is about.
struct Target {
    kind: &'static Kind,
    namespace: String,
    name: String,
}

impl Target {
    /// From the request's key, completed by the object's metadata.
    fn new(key: Option<ObjectKey>, object: &Value) -> Result<Target, Status> {
        let (kind, key) = kind_of_key(key)?;
        let or = |text: String, field: &str| match text.is_empty() {
            true => metadata_text(object, field).to_owned(),
            false => text,
        };
        Ok(Target {
            kind,
            namespace: or(key.namespace, "namespace"),
            name: or(key.name, "name"),
        })
    }

    fn attributes<'a>(&'a self, verb: &'a str) -> Attributes<'a> {
        Attributes::of(verb, self.kind, &self.namespace, &self.name)
    }

    fn required_name(&self) -> Result<&str, Status> {
        if self.name.is_empty() {
            return Err(Status::bad_request("the request names no object"));
        }
        Ok(&self.name)
    }
}

impl ObjectsService {
    pub(super) fn new(
        registry: Registry,
        tokens: Tokens,
        stop: CancellationToken,
    ) -> ObjectsService {
        ObjectsService {
            registry,
            tokens,
            stop,
        }
    }

    /// Kinds that are asked and never stored: TokenRequest (a subresource) and TokenReview.
    fn ask(&self, who: &Identity, request: &WriteRequest) -> Result<Option<Value>, Status> {
        let key = request.key.clone().unwrap_or_default();
        let encode = |error: serde_json::Error| Status::internal(format!("cannot encode: {error}"));
        let malformed = |error: serde_json::Error| Status::bad_request(error.to_string());
        let now = jiff::Timestamp::now();
        if request.subresource == "token" && key.plural == "serviceaccounts" {
            let (kind, key) = kind_of_key(request.key.clone())?;
            let what = Attributes::of("create", kind, &key.namespace, &key.name);
            self.registry.authorize(who, &what.sub("token"))?;
            let asked = serde_json::from_value(decode::parse(&request.json)?).map_err(malformed)?;
            let (registry, tokens) = (&self.registry, &self.tokens);
            let answer =
                tokens::answer_request(registry, tokens, &key.namespace, &key.name, asked, now)?;
            return serde_json::to_value(answer).map(Some).map_err(encode);
        }
        if request.subresource.is_empty() && key.plural == "tokenreviews" {
            self.registry.authorize(who, &TOKEN_REVIEW)?;
            let asked = serde_json::from_value(decode::parse(&request.json)?).map_err(malformed)?;
            let answer = tokens::review(&self.registry, &self.tokens, asked, now);
            return serde_json::to_value(answer).map(Some).map_err(encode);
        }
        Ok(None)
    }

    async fn create_object(
        &self,
        who: &Identity,
        request: WriteRequest,
    ) -> Result<Written, Status> {
        if let Some(object) = self.ask(who, &request)? {
            return Ok(Written {
                object,
                warnings: Vec::new(),
                created: true,
                unchanged: false,
            });
        }
        if request.subresource == EVICTION {
            return self.evict(who, request).await;
        }
        let write = Write::new(request, &[])?;
        let (kind, namespace) = (write.target.kind, &write.target.namespace);
        let judge = Judge::new(&self.registry, who);
        // Rules know no names of objects that are still to be made.
        judge.verb(&Attributes {
            name: "",
            ..write.target.attributes("create")
        })?;
        judge.content(kind, namespace, None, &write.object)?;
        self.registry
            .create_value(kind, namespace, write.object, &write.options)
            .await
    }

    /// `pods/eviction`: a deletion that asks the pod's disruption budget.
    async fn evict(&self, who: &Identity, request: WriteRequest) -> Result<Written, Status> {
        let eviction = decode::parse(&request.json)?;
        let target = Target::new(request.key, &eviction)?;
        if target.kind.kind != "Pod" {
            let resource = target.kind.qualified_resource();
            let text = format!("{resource} have no {EVICTION} subresource");
            return Err(Status::not_served(text));
        }
        let what = target.attributes("create").sub(EVICTION);
        self.registry.authorize(who, &what)?;
        let name = target.required_name()?;
        let (options, dry_run) = eviction::options(target.kind, name, &eviction)?;
        let dry_run = dry_run || request.dry_run;
        let evicted = self
            .registry
            .evict(&target.namespace, name, &options, dry_run);
        let written = evicted.await?;
        Ok(Written {
            object: json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                "code": 201}),
            created: true,
            ..written
        })
    }

    async fn update_object(
        &self,
        who: &Identity,
        request: WriteRequest,
    ) -> Result<Written, Status> {
        let subresource = request.subresource.clone();
        let write = Write::new(request, CHANGEABLE)?;
        let judge = Judge::new(&self.registry, who);
        judge.verb(&write.target.attributes("update").sub(&subresource))?;
        let wanted = |_: &Value| Ok(write.object.clone());
        self.change(&judge, &write.target, &subresource, &write.options, wanted)
            .await
    }

    async fn apply_object(&self, who: &Identity, request: WriteRequest) -> Result<Written, Status> {
        let write = Write::new(request, &[])?;
        let (kind, namespace) = (write.target.kind, &write.target.namespace);
        let name = write.target.required_name()?;
        self.registry
            .apply_value(
                kind,
                namespace,
                name,
                write.object,
                &write.options,
                &Judge::new(&self.registry, who),
            )
            .await
    }

    async fn patch_object(&self, who: &Identity, request: PatchRequest) -> Result<Written, Status> {
        refuse_subresource(&request.subresource, CHANGEABLE)?;
        let patch = Patch::parse(request.r#type(), &request.patch)?;
        let target = Target::new(request.key, &Value::Null)?;
        let judge = Judge::new(&self.registry, who);
        judge.verb(&target.attributes("patch").sub(&request.subresource))?;
        let options = WriteOptions {
            dry_run: request.dry_run,
            strict: true,
        };
        let wanted = |seen: &Value| patch.applied(seen);
        self.change(&judge, &target, &request.subresource, &options, wanted)
            .await
    }

    /// Update and patch: `wanted` makes what the client wants of what it sees.
    async fn change(
        &self,
        judge: &Judge<'_>,
        target: &Target,
        subresource: &str,
        options: &WriteOptions,
        wanted: impl Fn(&Value) -> Result<Value, Status> + Send + Sync,
    ) -> Result<Written, Status> {
        let (kind, namespace) = (target.kind, target.namespace.as_str());
        let name = target.required_name()?;
        let part = part_of(kind, subresource)?;
        let change = |old: &Value| {
            let new = match subresource {
                "scale" => scale::applied(kind, old, &wanted(&scale::view(kind, old)?)?),
                "resize" => resize::applied(kind, old, &wanted(old)?),
                _ => wanted(old),
            }?;
            judge.content(kind, namespace, Some(old), &new)?;
            Ok(new)
        };
        let written = self
            .registry
            .change_value(kind, namespace, name, part, options, change)
            .await?;
        match subresource {
            "scale" => scale::written(kind, written),
            _ => Ok(written),
        }
    }

    async fn delete_object(
        &self,
        who: &Identity,
        request: DeleteRequest,
    ) -> Result<Written, Status> {
        let target = Target::new(request.key, &Value::Null)?;
        self.registry.authorize(who, &target.attributes("delete"))?;
        let name = target.required_name()?;
        let propagation = match request.propagation.as_str() {
            "" | "Background" => Propagation::Background,
            "Foreground" => Propagation::Foreground,
            "Orphan" => Propagation::Orphan,
            other => {
                return Err(Status::bad_request(format!(
                    "propagation {other:?} is none of Background, Foreground, Orphan"
                )));
            }
        };
        let options = DeleteOptions {
            grace_period_s: request.grace_period_s,
            uid: Some(request.uid).filter(|uid| !uid.is_empty()),
            propagation,
            disruption: None,
        };
        let (kind, namespace) = (target.kind, target.namespace.as_str());
        self.registry
            .delete_value(kind, namespace, name, &options, request.dry_run)
            .await
    }
}

fn part_of(kind: &Kind, subresource: &str) -> Result<Part, Status> {
    match subresource {
        "status" => Ok(Part::Status),
        EPHEMERAL if kind.kind == "Pod" => Ok(Part::Ephemeral),
        EPHEMERAL => Err(Status::not_served(format!(
            "{} have no {EPHEMERAL} subresource",
            kind.qualified_resource()
        ))),
        _ => Ok(Part::Object),
    }
}

fn refuse_subresource(subresource: &str, allowed: &[&str]) -> Result<(), Status> {
    if subresource.is_empty() || allowed.contains(&subresource) {
        return Ok(());
    }
    let text = format!("the server does not serve this verb on the subresource {subresource:?}");
    Err(Status::not_served(text))
}

/// The answer to a write that ends in time.
async fn answer(
    call: Option<Call>,
    write: impl Future<Output = Result<Written, Status>> + Send,
) -> Result<Response<WriteReply>, tonic::Status> {
    let result = tokio::time::timeout(WRITE_TIMEOUT, Box::pin(write)).await;
    let result = result.unwrap_or_else(|_| {
        let text = format!("the write took longer than {WRITE_TIMEOUT:?}; it may still happen");
        Err(Status::timeout(text))
    });
    if let Some(call) = call {
        call.done(result.as_ref().err().cloned()).await;
    }
    let written = result?;
    let json = serde_json::to_vec(&written.object)
        .map_err(|error| Status::internal(format!("cannot encode the answer: {error}")))?;
    Ok(Response::new(WriteReply {
        json: json.into(),
        warnings: written.warnings,
        created: written.created,
        unchanged: written.unchanged,
    }))
}

impl ObjectsService {
    /// Notes who asks, where there is an audit log.
    fn call<T>(
        &self,
        request: &Request<T>,
        who: &Identity,
        verb: &'static str,
        key: Option<&ObjectKey>,
    ) -> Option<Call> {
        Call::new(self.registry.audit(), request, who, verb, key)
    }

    fn write_call(
        &self,
        request: &Request<WriteRequest>,
        who: &Identity,
        verb: &'static str,
    ) -> Option<Call> {
        let asked = request.get_ref();
        let call = self.call(request, who, verb, asked.key.as_ref())?;
        Some(call.of_write(&asked.subresource, &asked.json, asked.dry_run))
    }

    fn get_object(&self, who: &Identity, request: GetRequest) -> Result<Object, Status> {
        let (kind, key) = kind_of_key(request.key)?;
        let what = Attributes::of("get", kind, &key.namespace, &key.name);
        self.registry.authorize(who, &what)?;
        let entry = self.registry.get_entry(kind, &key.namespace, &key.name);
        let entry = entry.ok_or_else(|| Status::not_found(kind, &key.name))?;
        let json = present(&entry, entry.mod_revision);
        Ok(Object { json })
    }

    fn list_objects(&self, who: &Identity, request: ListRequest) -> Result<ObjectList, Status> {
        let view = View::new(
            request.key,
            &request.label_selector,
            &request.field_selector,
        )?;
        self.registry.authorize(who, &view.attributes("list"))?;
        let (revision, entries) = self.registry.store().list(&view.prefix);
        let mut items = Vec::with_capacity(entries.len());
        for entry in &entries {
            if view.has(entry)? {
                items.push(present(entry, entry.mod_revision));
            }
        }
        Ok(ObjectList {
            items,
            resource_version: revision.to_string(),
        })
    }

    fn watch_objects(&self, who: &Identity, request: &WatchRequest) -> Result<Events, Status> {
        let view = View::new(
            request.key.clone(),
            &request.label_selector,
            &request.field_selector,
        )?;
        self.registry.authorize(who, &view.attributes("watch"))?;
        let stream = watch::open(self.registry.store(), view, request, self.stop.clone())?;
        Ok(Box::pin(stream))
    }

    fn table_of(&self, who: &Identity, request: ListRequest) -> Result<TableReply, Status> {
        let view = View::new(
            request.key,
            &request.label_selector,
            &request.field_selector,
        )?;
        let verb = if view.is_one { "get" } else { "list" };
        self.registry.authorize(who, &view.attributes(verb))?;
        let renderer = Renderer::new(view.kind, request.wide, request.with_namespace);
        let (revision, entries) = self.registry.store().list(&view.prefix);
        let mut rows = Vec::with_capacity(entries.len());
        for entry in &entries {
            if view.has(entry)? {
                rows.push(renderer.row(entry)?);
            }
        }
        Ok(TableReply {
            columns: renderer.columns(),
            rows,
            resource_version: revision.to_string(),
        })
    }
}

/// Notes how a read ended.
async fn noted<T>(
    call: Option<Call>,
    result: Result<T, Status>,
) -> Result<Response<T>, tonic::Status> {
    if let Some(call) = call {
        call.done(result.as_ref().err().cloned()).await;
    }
    Ok(Response::new(result?))
}

#[tonic::async_trait]
impl Objects for ObjectsService {
    type WatchStream = Events;

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Object>, tonic::Status> {
        let who = caller(&request)?;
        let call = self.call(&request, &who, "get", request.get_ref().key.as_ref());
        let result = self.get_object(&who, request.into_inner());
        noted(call, result).await
    }

    async fn list(
        &self,
        request: Request<ListRequest>,
    ) -> Result<Response<ObjectList>, tonic::Status> {
        let who = caller(&request)?;
        let call = self.call(&request, &who, "list", request.get_ref().key.as_ref());
        let result = self.list_objects(&who, request.into_inner());
        noted(call, result).await
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, tonic::Status> {
        let who = caller(&request)?;
        let call = self.call(&request, &who, "watch", request.get_ref().key.as_ref());
        let result = self.watch_objects(&who, request.get_ref());
        noted(call, result).await
    }

    async fn create(
        &self,
        request: Request<WriteRequest>,
    ) -> Result<Response<WriteReply>, tonic::Status> {
        let who = caller(&request)?;
        let call = self.write_call(&request, &who, "create");
        answer(call, self.create_object(&who, request.into_inner())).await
    }

    async fn update(
        &self,
        request: Request<WriteRequest>,
    ) -> Result<Response<WriteReply>, tonic::Status> {
        let who = caller(&request)?;
        let call = self.write_call(&request, &who, "update");
        answer(call, self.update_object(&who, request.into_inner())).await
    }

    async fn apply(
        &self,
        request: Request<WriteRequest>,
    ) -> Result<Response<WriteReply>, tonic::Status> {
        let who = caller(&request)?;
        let call = self.write_call(&request, &who, "patch");
        answer(call, self.apply_object(&who, request.into_inner())).await
    }

    async fn patch(
        &self,
        request: Request<PatchRequest>,
    ) -> Result<Response<WriteReply>, tonic::Status> {
        let who = caller(&request)?;
        let asked = request.get_ref();
        let call = self.call(&request, &who, "patch", asked.key.as_ref());
        let call = call.map(|call| call.of_write(&asked.subresource, &[], asked.dry_run));
        answer(call, self.patch_object(&who, request.into_inner())).await
    }

    async fn delete(
        &self,
        request: Request<DeleteRequest>,
    ) -> Result<Response<WriteReply>, tonic::Status> {
        let who = caller(&request)?;
        let asked = request.get_ref();
        let call = self.call(&request, &who, "delete", asked.key.as_ref());
        let call = call.map(|call| call.of_write("", &[], asked.dry_run));
        answer(call, self.delete_object(&who, request.into_inner())).await
    }

    async fn table(
        &self,
        request: Request<ListRequest>,
    ) -> Result<Response<TableReply>, tonic::Status> {
        let who = caller(&request)?;
        let one = request
            .get_ref()
            .key
            .as_ref()
            .is_some_and(|key| !key.name.is_empty());
        let verb = if one { "get" } else { "list" };
        let call = self.call(&request, &who, verb, request.get_ref().key.as_ref());
        let result = self.table_of(&who, request.into_inner());
        noted(call, result).await
    }

    async fn kinds(
        &self,
        _request: Request<KindsRequest>,
    ) -> Result<Response<KindsReply>, tonic::Status> {
        let kinds = KINDS.iter().map(|kind| kinds_reply::Kind {
            group: kind.group.to_owned(),
            version: kind.version.to_owned(),
            kind: kind.kind.to_owned(),
            plural: kind.plural.to_owned(),
            singular: kind.singular.to_owned(),
            short_names: kind.short_names.iter().map(|s| (*s).to_owned()).collect(),
            namespaced: kind.namespaced,
        });
        Ok(Response::new(KindsReply {
            kinds: kinds.collect(),
        }))
    }
}
