-- The recorder's server mod. It reads two files in the world's folder, each an object with an `id`:
--   prepare.json {id, seed, biome}         find a start place on dry land under open sky in that biome, and load
--                                          the terrain around it
--   go.json      {id, time, weather, yaw}  move the player to the start place prepared under this id
-- It answers in the log: "OCHRE prepared {id, pos, biome}", "OCHRE placed {id, pos, biome}".

local WORLD = minetest.get_worldpath()
local REACH = 20000 -- metres from the origin
local AROUND = {x = 56, below = 24, above = 40, z = 56} -- metres of terrain to load around a start place
local TOP = 110 -- height at which the search for the ground starts
local SAMPLES = 150 -- random positions tested in one server step
local ROUNDS = 60 -- steps after which any biome is accepted

local player
local place -- {id, pos, biome} of the start place that was prepared last
local last_id = {} -- [file] = id that was read last

local function read_request(file)
	local f = io.open(WORLD .. "/" .. file, "r")
	if not f then return end
	local request = minetest.parse_json(f:read("*a") or "")
	f:close()
	if request and request.id ~= last_id[file] then
		last_id[file] = request.id
		return request
	end
end

local function answer(event, content)
	minetest.log("action", "OCHRE " .. event .. " " .. minetest.write_json(content))
end

local function biome_at(pos)
	local data = minetest.get_biome_data(pos)
	return data and minetest.get_biome_name(data.biome) or "unknown"
end

local function is_ground(name)
	local node = minetest.registered_nodes[name]
	return node and node.walkable and minetest.get_item_group(name, "leaves") == 0
		and minetest.get_item_group(name, "tree") == 0
end

local function is_air(name)
	local node = minetest.registered_nodes[name]
	return node and not node.walkable and node.liquidtype == "none" and name ~= "ignore"
end

-- Height at which a player can stand, or nil over water, under a roof or in a tree.
local function standing_height(x, z)
	local function name(y) return minetest.get_node({x = x, y = y, z = z}).name end
	for y = TOP, 1, -1 do
		local node = minetest.registered_nodes[name(y)]
		if node and node.liquidtype ~= "none" then return end
		if is_ground(name(y)) then
			return is_air(name(y + 1)) and is_air(name(y + 2)) and y + 1 or nil
		end
	end
end

local function load_area(from, to, done)
	minetest.emerge_area(from, to, function(_, _, left) if left == 0 then done() end end)
end

local search -- forward declaration

local function try_place(request, random, round, x, z)
	load_area({x = x, y = 0, z = z}, {x = x, y = TOP + 1, z = z}, function()
		local y = standing_height(x, z)
		local pos = {x = x, y = y, z = z}
		if not y or (round < ROUNDS and request.biome ~= "" and biome_at(pos) ~= request.biome) then
			return search(request, random, round + 1)
		end
		load_area(
			{x = x - AROUND.x, y = y - AROUND.below, z = z - AROUND.z},
			{x = x + AROUND.x, y = y + AROUND.above, z = z + AROUND.z},
			function()
				if last_id["prepare.json"] ~= request.id then return end -- a newer request
				place = {id = request.id, pos = pos, biome = biome_at(pos)}
				answer("prepared", place)
			end)
	end)
end

function search(request, random, round)
	local any = round >= ROUNDS or request.biome == ""
	for _ = 1, SAMPLES do
		local x, z = random:next(-REACH, REACH), random:next(-REACH, REACH)
		-- Low land in two of three rounds; in the third, mountains, where the game's own spawn search finds nothing.
		local y = round % 3 == 2 and 30 or 8
		if any or biome_at({x = x, y = y, z = z}) == request.biome then
			y = round % 3 == 2 and y or minetest.get_spawn_level(x, z)
			if y then return try_place(request, random, round, x, z) end
		end
	end
	minetest.after(0, search, request, random, round + 1)
end

local rain -- id of the particle spawner
local function set_weather(name)
	if rain then minetest.delete_particlespawner(rain) end
	rain = nil
	if name == "clear" then
		player:set_sky({type = "regular", clouds = true})
		player:set_clouds({density = 0.4, color = "#fff0f0e5"})
		player:set_sun({visible = true, sunrise_visible = true})
		player:override_day_night_ratio(nil)
		return
	end
	player:set_sky({type = "plain", base_color = "#8a929c", clouds = true})
	player:set_clouds({density = 0.9, color = "#a8acb4f0"})
	player:set_sun({visible = false, sunrise_visible = false})
	player:override_day_night_ratio(0.7)
	if name == "rain" then
		rain = minetest.add_particlespawner({
			amount = 2400, time = 0, attached = player, vertical = true, minsize = 0.4, maxsize = 0.8,
			minpos = {x = -12, y = 6, z = -12}, maxpos = {x = 12, y = 12, z = 12},
			minvel = {x = 0, y = -14, z = 0}, maxvel = {x = 0, y = -11, z = 0},
			minexptime = 0.8, maxexptime = 1.2, collisiondetection = true, collision_removal = true,
			texture = "default_cloud.png^[colorize:#8094b8:255^[opacity:150",
		})
	end
end

local function go(request)
	minetest.set_timeofday(request.time)
	set_weather(request.weather)
	player:set_pos(place.pos)
	player:set_look_horizontal(math.rad(request.yaw))
	player:set_look_vertical(0)
	answer("placed", place)
end

local waiting -- a go.json whose start place is not ready yet
minetest.register_globalstep(function()
	if not player then return end
	local wanted = read_request("prepare.json")
	if wanted then search(wanted, PcgRandom(wanted.seed), 0) end
	waiting = read_request("go.json") or waiting
	if waiting and place and place.id == waiting.id then
		go(waiting)
		waiting = nil
	end
end)

minetest.register_on_joinplayer(function(joined)
	player = joined
	player:hud_set_flags({
		hotbar = false, healthbar = false, crosshair = false, wielditem = false, breathbar = false,
		minimap = false, minimap_radar = false,
	})
	player:set_armor_groups({immortal = 1})
	minetest.set_player_privs(player:get_player_name(), {}) -- the player can look and walk, not dig or build
	answer("joined", {})
end)
