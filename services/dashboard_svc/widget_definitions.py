"""What a version of a kind makes of options: a query, and how to draw its answer. Pure, and bounded in time."""

from __future__ import annotations

from google.protobuf.json_format import ParseDict, ParseError
from google.protobuf.struct_pb2 import Struct
from meshboard.analytics.v1.query_pb2 import Query
from meshboard.dashboard.v1.dashboard_pb2 import CustomWidget, Widget
from meshboard.dashboard.v1.widget_kind_pb2 import WidgetKind

from services.chassis import errors
from services.chassis.interceptor import validate
from services.dashboard_svc import placeholders, vega_lite
from services.dashboard_svc.option_schemas import OptionSchema
from services.dashboard_svc.structs import Json, Unfit, json_of, struct_of

# Of schema, template, spec and options, each.
MAX_BYTES = 32 << 10


class WidgetDefinition:
    """The schema, the query's template and the spec of a kind, as `kind` has them.

    Raises INVALID_ARGUMENT (WIDGET_KIND_INVALID) for what is not let in.
    """

    def __init__(self, kind: WidgetKind) -> None:
        self._kind = kind
        field = "options_schema"
        try:
            self._schema = OptionSchema(json_of(kind.options_schema, MAX_BYTES))
            field = "query_template"
            self._query = json_of(kind.query_template, MAX_BYTES)
            placeholders.check(self._query, self._schema, columns=False)
            _query_of(placeholders.emptied(self._query))
            field = "spec"
            self._spec = json_of(kind.spec, MAX_BYTES) if kind.HasField("spec") else None
            if self._spec is not None:
                placeholders.check(self._spec, self._schema, columns=True)
                vega_lite.check(self._spec)
        except Unfit as problem:
            raise errors.invalid_argument("WIDGET_KIND_INVALID", f"{field}: {problem}", field=field) from None

    def made_of(self, options: Struct) -> Widget:
        """The fields of a widget of the kind with these options that depend on both.

        Raises INVALID_ARGUMENT (WIDGET_OPTIONS_INVALID).
        """
        query, spec = self._made_of(options)
        custom = CustomWidget(
            widget_kind_id=self._kind.widget_kind_id,
            version=self._kind.version,
            options=options,
            spec=spec,
            kind_name=self._kind.name,
        )
        return Widget(kind=Widget.CUSTOM, query=query, custom=custom)

    def _made_of(self, options: Struct) -> tuple[Query, Struct | None]:
        try:
            given = json_of(options, MAX_BYTES)
            self._schema.check(given)
            query = _query_of(placeholders.filled(self._query, given, self._schema))
            _validate(query)
            if self._spec is None:
                return query, None
            spec = placeholders.filled(self._spec, given, self._schema)
            # Once more, with what the options say: a text that is harmless as a title is none as a condition.
            vega_lite.check(spec)
        except Unfit as problem:
            raise errors.invalid_argument(
                "WIDGET_OPTIONS_INVALID", f"custom.options: {problem}", field="custom.options"
            ) from None
        return query, struct_of(spec)


def _query_of(json: Json) -> Query:
    try:
        return ParseDict(json, Query())
    except ParseError as error:
        raise Unfit(f"is no query: {error}") from None


def _validate(query: Query) -> None:
    try:
        validate(query)
    except errors.Error as error:
        raise Unfit(f"what becomes of them is no query: {error}") from None
