# The part of nixpkgs' module system that modules/ uses: options, types, priorities, and what is said of an option that does not exist.
# Same names, same meaning, nothing more: no specialArgs but what is given, no order of lists but that of the modules.
lib:
let
  inherit (builtins)
    all
    any
    attrNames
    concatMap
    filter
    foldl'
    head
    isAttrs
    isFunction
    isList
    length
    listToAttrs
    mapAttrs
    ;
  typeOf = value: value._type or "";
  optionAt = options: typeOf options == "option";
  show = lib.concatStringsSep ".";
  zip =
    f: sets:
    listToAttrs (
      map (name: {
        inherit name;
        value = f name (map (set: set.${name}) (filter (set: set ? ${name}) sets));
      }) (attrNames (foldl' (a: b: a // b) { } sets))
    );

  # Conditions and priorities of a set are those of each of its members: so what is defined is known before any condition is.
  push =
    value:
    if typeOf value == "merge" then
      concatMap push value.contents
    else if typeOf value == "if" then
      map (mapAttrs (_: lib.mkIf value.condition)) (push value.content)
    else if typeOf value == "override" then
      map (mapAttrs (_: lib.mkOverride value.priority)) (push value.content)
    else if isAttrs value then
      [ value ]
    else
      throw "a set is wanted where ${builtins.typeOf value} is";
  # What of a definition is left when conditions are known.
  discharge =
    value:
    if typeOf value == "merge" then
      concatMap discharge value.contents
    else if typeOf value == "if" then
      if value.condition then discharge value.content else [ ]
    else if typeOf value == "override" then
      map (one: one // { inherit (value) priority; }) (discharge value.content)
    else
      [
        {
          inherit value;
          priority = 100;
        }
      ];
  strongest =
    found:
    let
      least = foldl' (a: one: if one.priority < a then one.priority else a) 9999 found;
    in
    map (one: one.value) (filter (one: one.priority == least) found);

  merged =
    path: type: definitions:
    let
      values = strongest (concatMap discharge definitions);
      wrong = filter (value: !type.check value) values;
    in
    if wrong != [ ] then
      throw "A definition for option `${show path}' is not of type `${type.description}'."
    else
      type.merge path values;
  # Submodules and sets take definitions with their conditions in them, because a member may have what another lacks.
  optionValue =
    path: option: definitions:
    let
      found = concatMap discharge definitions;
      value =
        if found != [ ] then
          merged path option.type (
            definitions ++ lib.optional (option ? default) (lib.mkOverride 1500 option.default)
          )
        else if option ? default then
          merged path option.type [ option.default ]
        else if option.type ? empty then
          option.type.empty path
        else
          throw "The option `${show path}' was accessed but has no value defined. Try setting the option.";
    in
    if (option.readOnly or false) && length found > 1 then
      throw "The option `${show path}' is read-only, but it's set multiple times."
    else
      (option.apply or (value: value)) value;

  evaluate =
    {
      modules,
      specialArgs,
      path,
    }:
    let
      load =
        module:
        let
          read = if builtins.isPath module || builtins.isString module then import module else module;
          args = specialArgs // {
            inherit config lib;
            options = declared;
          };
          body =
            if isFunction read then
              read (
                builtins.intersectAttrs (lib.functionArgs read) args
                // lib.optionalAttrs (lib.functionArgs read == { }) args
              )
            else
              read;
          isLong = body ? config || body ? options;
        in
        concatMap load (body.imports or [ ])
        ++ [
          {
            options = body.options or { };
            config =
              if isLong then
                body.config or { }
              else
                removeAttrs body [
                  "imports"
                  "freeformType"
                ];
            freeform = body.freeformType or null;
          }
        ];
      loaded = concatMap load modules;
      freeforms = filter (type: type != null) (map (module: module.freeform) loaded);
      declare = zip (_: options: if any optionAt options then head options else declare options);
      declared = declare (map (module: module.options) loaded);
      definitions = concatMap (module: push module.config) loaded;

      # Values of options below a path, and definitions of which no option is there.
      below =
        path: options: sets:
        let
          unknown = removeAttrs (zip (_: values: values) sets) (attrNames options);
          inner = mapAttrs (
            name: option:
            let
              values = map (set: set.${name}) (filter (set: set ? ${name}) sets);
            in
            if optionAt option then
              {
                value = optionValue (path ++ [ name ]) option values;
                unknown = { };
              }
            else
              below (path ++ [ name ]) option (concatMap push values)
          ) options;
        in
        {
          value = mapAttrs (_: one: one.value) inner;
          unknown = unknown // lib.filterAttrs (_: one: one != { }) (mapAttrs (_: one: one.unknown) inner);
        };
      all' = below path declared definitions;
      flat =
        path: unknown:
        concatMap (
          name:
          if isAttrs unknown.${name} then
            flat (path ++ [ name ]) unknown.${name}
          else
            [ (show (path ++ [ name ])) ]
        ) (attrNames unknown);
      free = if freeforms == [ ] then { } else (head freeforms).merge path [ (undo all'.unknown) ];
      # A list of definitions is a definition again.
      undo = mapAttrs (_: one: if isAttrs one then undo one else lib.mkMerge one);
      config =
        if freeforms == [ ] then
          if all'.unknown != { } then
            throw "The option `${head (flat path all'.unknown)}' does not exist."
          else
            all'.value
        else
          recursive free all'.value;
    in
    {
      inherit config;
      options = declared;
    };
  recursive =
    a: b:
    a
    // mapAttrs (
      name: value:
      if isAttrs value && isAttrs (a.${name} or null) && !(value ? outPath) then
        recursive a.${name} value
      else
        value
    ) b;

  one =
    path: values:
    if all (value: value == head values) values then
      head values
    else
      throw "The option `${show path}' has conflicting definition values.";
  simple = description: check: {
    inherit description check;
    merge = one;
  };
  types = rec {
    bool = simple "boolean" builtins.isBool;
    int = simple "signed integer" builtins.isInt;
    ints.between =
      low: high:
      simple "integer between ${toString low} and ${toString high} (both inclusive)" (
        value: builtins.isInt value && low <= value && value <= high
      );
    ints.positive = simple "positive integer, meaning >0" (value: builtins.isInt value && value > 0);
    str = simple "string" builtins.isString;
    strMatching =
      pattern:
      simple "string matching the pattern ${pattern}" (
        value: builtins.isString value && builtins.match pattern value != null
      );
    path = simple "absolute path" (value: builtins.substring 0 1 (toString value) == "/");
    package = simple "package" (value: isAttrs value && value ? outPath);
    raw = simple "raw value" (_: true);
    enum =
      values:
      simple "one of ${lib.concatMapStringsSep ", " builtins.toJSON values}" (
        value: builtins.elem value values
      );
    nullOr = type: {
      description = "null or ${type.description}";
      check = value: value == null || type.check value;
      merge =
        path: values: if any (value: value == null) values then one path values else type.merge path values;
    };
    either = a: b: {
      description = "${a.description} or ${b.description}";
      check = value: a.check value || b.check value;
      merge = path: values: if all a.check values then a.merge path values else b.merge path values;
    };
    listOf = type: {
      description = "list of ${type.description}";
      check = isList;
      merge = path: values: map (value: merged path type [ value ]) (lib.concatLists values);
      empty = _: [ ];
    };
    attrsOf = type: {
      description = "attribute set of ${type.description}";
      check = isAttrs;
      merge =
        path: values:
        let
          members = zip (_: found: found) (concatMap push values);
        in
        mapAttrs (name: found: merged (path ++ [ name ]) type found) (
          lib.filterAttrs (_: found: concatMap discharge found != [ ]) members
        );
      empty = _: { };
    };
    # Leaves of files: sets are merged, all else is taken as it is.
    anything = {
      description = "anything";
      check = _: true;
      merge =
        path: values:
        if all (value: isAttrs value && !(value ? outPath)) values then
          (attrsOf anything).merge path values
        else if all isList values then
          lib.concatLists values
        else
          one path values;
    };
    submodule =
      module:
      let
        at =
          path: values:
          (evaluate {
            modules = lib.toList module ++ values;
            specialArgs.name = lib.last path;
            inherit path;
          }).config;
      in
      {
        description = "submodule";
        check = value: isAttrs value || isFunction value;
        merge = at;
        empty = path: at path [ ];
      };
  };
in
{
  inherit types;
  evalModules =
    {
      modules,
      specialArgs ? { },
    }:
    evaluate {
      inherit modules specialArgs;
      path = [ ];
    };
  mkOption = option: option // { _type = "option"; };
  mkIf = condition: content: {
    _type = "if";
    inherit condition content;
  };
  mkMerge = contents: {
    _type = "merge";
    inherit contents;
  };
  mkOverride = priority: content: {
    _type = "override";
    inherit priority content;
  };
  mkDefault = lib.mkOverride 1000;
  mkOptionDefault = lib.mkOverride 1500;
  mkForce = lib.mkOverride 50;
  mkEnableOption =
    name:
    lib.mkOption {
      type = types.bool;
      default = false;
      description = "Whether to enable ${name}.";
    };
  literalExpression = text: {
    _type = "literalExpression";
    inherit text;
  };
}
